"""The draw kernel against the sampler: the same tokens, whatever the block, the shard and the group."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rowcast.kernels.gpu import drawing
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.philox import Purpose, gumbel
from rowcast.runtime.sampler import Row, Sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 2170
SEEDS = (0, 1, 5, 2**31, 2**32 + 7, 2**63 - 1, 0x0123456789ABCDEF)


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=g) * 4).to(dtype)


def parameters(rows: int) -> dict[str, Tensor]:
    """Greedy rows among others, seeds of 64 bits, positions far apart."""
    at = torch.arange(rows)
    return {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5, 0.05])[at % 5],
        "log_min_p": torch.tensor([-math.inf, -math.inf, math.log(0.3), math.log(0.02), -math.inf, math.log(1e-6), 0.0])[at % 7],
        "seeds": torch.tensor(SEEDS)[at % len(SEEDS)],
        "sample_index": at % 3,
        "positions": at * 7919 % 131072,
    }


def expected(
    logits: Tensor, p: dict[str, Tensor], first: int = 0, stream: tuple[int, int, int] = (0, 0, 0)
) -> tuple[Tensor, Tensor]:
    """Values and ids by plain torch, on the CPU."""
    x = logits.cpu().float()
    random = p["temperature"] > 0
    law = x / torch.where(random, p["temperature"], 1.0)[:, None]
    cut = torch.where(random, p["log_min_p"], -math.inf)[:, None]
    law = law.masked_fill(law < law.amax(-1, keepdim=True) + cut, -math.inf)
    tokens = range(first, first + x.shape[1])
    noise = gumbel(
        p["seeds"], p["sample_index"], p["positions"], tokens, purpose=Purpose(stream[0]), rung=stream[1], round_index=stream[2]
    )
    score = torch.where(random[:, None], noise + law, law.double())
    value, ids = score.max(-1).values, score.argmax(-1)
    return value, torch.where(value.isnan(), -1, ids + first)


def call(logits: Tensor, p: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    there: dict[str, Any] = {name: t.to(DEVICE) for name, t in p.items()}
    values, ids = drawing.draw_best(logits.to(DEVICE), **there, **options).cpu()
    return values, ids.view(torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rough", [False, True])
def test_draws_what_torch_draws(dtype: torch.dtype, rough: bool) -> None:
    logits, p = logits_of(21, VOCABULARY, dtype), parameters(21)
    values, ids = call(logits, p, rough=rough)
    want, wanted = expected(logits, p)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(values, want, rtol=1e-12, atol=1e-12)


def test_draws_what_the_sampler_draws() -> None:
    sampler = Sampler(VOCABULARY)
    many, drawn = 12, []
    logits = logits_of(many, VOCABULARY, torch.bfloat16, 1)
    for i in range(many):
        chosen = SamplingParams(temperature=(0.0, 0.3, 0.8, 1.3)[i % 4], min_p=(0.0, 0.1, 0.4)[i % 3])
        sampler.add(i, chosen, seed=SEEDS[i % len(SEEDS)], sample_index=i % 2, prompt_ids=[1] * (i + 3), eos_ids=[])
        drawn.append(chosen)
    p = {
        "temperature": torch.tensor([0.0 if d.greedy else d.temperature for d in drawn]),
        "log_min_p": torch.tensor([math.log(d.min_p) if d.min_p else -math.inf for d in drawn]),
        "seeds": torch.tensor([SEEDS[i % len(SEEDS)] for i in range(many)]),
        "sample_index": torch.arange(many) % 2,
        "positions": torch.arange(many) + 3,
    }
    assert torch.equal(call(logits, p)[1], sampler.sample([Row(i) for i in range(many)], logits))


def test_many_seeds_and_positions() -> None:
    """Noise alone: over flat logits nothing but the words decides."""
    g = torch.Generator().manual_seed(2)
    many = 32
    p = {
        "temperature": torch.ones(many),
        "log_min_p": torch.full((many,), -math.inf),
        "seeds": torch.randint(-(2**62), 2**62, (many,), generator=g) * 2 + 1,
        "sample_index": torch.randint(2**32, (many,), generator=g),
        "positions": torch.randint(2**32, (many,), generator=g),
    }
    logits = torch.zeros(many, 1003)
    stream = (2, 200, 65535)
    ids = call(logits, p, purpose=stream[0], rung=stream[1], round_index=stream[2])[1]
    assert torch.equal(ids, expected(logits, p, stream=stream)[1])
    assert len(set(ids.tolist())) > many / 2
    p = {**p, "positions": torch.randint(2**17, (many,), generator=g, dtype=torch.int32)}
    assert torch.equal(call(logits, p, rough=True)[1], expected(logits, p)[1])


def drawn_by_shards(logits: Tensor, p: dict[str, Tensor], firsts: list[int]) -> list[int]:
    """What shards that begin at these tokens come to."""
    there: dict[str, Any] = {name: t.to(DEVICE) for name, t in p.items()}
    highest = logits.amax(-1).to(DEVICE)
    ends = [*firsts[1:], logits.shape[1]]
    found = [
        drawing.draw_best(logits[:, first:end].to(DEVICE), **there, first_token=first, highest=highest)
        for first, end in zip(firsts, ends, strict=True)
    ]
    return drawing.winners(torch.stack(found)).tolist()


@pytest.mark.parametrize("firsts", [[0], [0, 1], [0, 1027], [0, 700, 1401]])
def test_shards_draw_the_whole(firsts: list[int]) -> None:
    logits, p = logits_of(14, VOCABULARY, torch.float32, 3), parameters(14)
    assert drawn_by_shards(logits, p, firsts) == expected(logits, p)[1].tolist()


def test_shards_agree_on_ties_and_nan() -> None:
    rows = torch.zeros(6, 2100)
    rows[0, [3, 2000]] = 1.0  # the lowest id, whoever has it
    rows[1, [1500, 2050]] = 1.0
    rows[2, 5] = math.nan
    rows[3, 2099] = math.nan
    rows[4] = -math.inf
    rows[5, :1000] = -math.inf
    p = parameters(6)
    p["temperature"] = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.0])
    assert drawn_by_shards(rows, p, [0, 1000]) == [3, 1500, -1, -1, 0, 1000]


def test_ties_infinities_and_nan() -> None:
    rows = torch.zeros(8, 2100)
    rows[0, [3, 2000]] = 1.0  # greedy: the lowest id
    rows[1, 2050] = math.nan
    rows[2, 5] = math.nan
    rows[3] = math.nan
    rows[4] = -math.inf
    rows[5, [70, 1999]] = math.inf
    rows[6] = -math.inf
    rows[6, 1998] = -3e38
    p = parameters(8)
    p["temperature"] = torch.tensor([0.0, 0.0, 0.9, 1.0, 1.0, 1.0, 2.0, 0.0])
    for rough in (False, True):
        assert call(rows, p, rough=rough)[1].tolist() == [3, -1, -1, -1, 0, 70, 1998, 0]


def test_near_ties_are_told_apart_in_float64() -> None:
    """Logits that undo the noise of a few tokens, down to float32's last bits, and leave no chance to the others."""
    many, vocabulary = 16, 1500
    p = parameters(many)
    p["temperature"], p["log_min_p"] = torch.ones(many), torch.full((many,), -math.inf)
    noise = gumbel(p["seeds"], p["sample_index"], p["positions"], range(vocabulary))
    chosen = torch.rand(many, vocabulary, generator=torch.Generator().manual_seed(6)) < 0.003
    logits = torch.where(chosen, 0.01 - noise, -40.0).float()
    for rough in (False, True):
        assert torch.equal(call(logits, p, rough=rough)[1], expected(logits, p)[1])


def test_groups_offsets_and_rows_left_out() -> None:
    logits, p = logits_of(12, 1300, torch.bfloat16, 4), parameters(4)
    spread = {name: t.repeat_interleave(3) for name, t in p.items()}
    spread["positions"] = torch.arange(12) + 40
    rows = torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
    there: dict[str, Any] = {name: t.to(DEVICE) for name, t in {**p, "positions": torch.arange(12, dtype=torch.int32)}.items()}
    ids = drawing.draw(logits.to(DEVICE), **there, rows=rows.to(DEVICE), group=3, offset=40).cpu()
    assert torch.equal(ids, torch.where(rows != 0, expected(logits, spread)[1], 0))


def test_without_min_p_and_of_a_slice() -> None:
    logits, p = logits_of(5, 1600, torch.float16, 5), parameters(5)
    p["log_min_p"] = torch.full((5,), -math.inf)
    there: dict[str, Any] = {**{name: t.to(DEVICE) for name, t in p.items()}, "log_min_p": None}
    part = logits.to(DEVICE)[:, 100:1400]
    assert torch.equal(drawing.draw(part, **there).cpu(), expected(part, p)[1])


@pytest.mark.gpu
def test_replays_with_other_parameters() -> None:
    many, vocabulary = 7, 128_256
    logits = torch.empty(many, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    p = parameters(many)
    there: dict[str, Any] = {name: t.to(DEVICE) for name, t in p.items()}
    logits.normal_()
    drawing.draw(logits, **there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = drawing.draw(logits, **there)
    for trial in range(10):
        logits.normal_(std=trial / 2)
        p["seeds"] += 2**33 + trial
        p["positions"] += trial
        p["temperature"] = p["temperature"].roll(1)
        for name, t in p.items():
            there[name].copy_(t)
        graph.replay()
        assert torch.equal(ids.cpu(), expected(logits, p)[1])
