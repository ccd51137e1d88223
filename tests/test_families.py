"""Every family against Transformers: the same logits for a prompt and for tokens decoded after it, in float32.

The reference runs the prompt in one pass and then token by token, with its own cache. Transformers' dynamic NTK rope is stateful:
it keeps the frequencies of the longest sequence seen until a pass ends below the original context. Each reference here is
therefore a fresh model that sees one sequence; there its rule is ours (token i: length max(i + 1, prompt length)).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_comm import run_ranks
from tiny import CASES, VOCAB, tiny_model
from torch import Tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from rowcast.placement.resident import pass_bytes
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.protocols import Comm
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep
from rowcast.runtime.weights import DenseWeights

PROMPT_TOKENS = 24
NEW_TOKENS = 20
BLOCK_SIZE = 4
NUM_BLOCKS = 96
TOLERANCE = 1e-4


class Ours:
    """One rank of our model with its own KV cache: the one place that knows how to put both together."""

    def __init__(self, path: Path, comm: Comm, device: str = "cpu") -> None:
        spec = spec_from_config(json.loads((path / "config.json").read_text()))
        self.decoder = load_decoder(
            spec, SafetensorsSource.open(path), dtype=torch.float32, device=torch.device(device), comm=comm
        )
        self.kv = PagedKV(
            spec,
            Shard(comm.rank, comm.world),
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=torch.device(device),
        )

    def logits(self, tokens: list[int], prompt: int, chunk: int) -> Tensor:
        """Logits [T, V] of all `tokens`: the first `prompt` in passes of `chunk`, the others one by one."""
        blocks = list(range(NUM_BLOCKS - 1, -1, -2)) + list(range(0, NUM_BLOCKS, 2))  # no two neighbours
        ends = [*range(chunk, prompt, chunk), *range(prompt, len(tokens) + 1)]
        rows, start = [], 0
        for end in ends:
            step = SeqStep(7, tokens[start:end], start, blocks[: -(-end // BLOCK_SIZE)], prompt, sample=True)
            rows.append(self.decoder.logits(self.decoder.run([step], self.kv)))
            self.kv.commit(7, end - start)
            start = end
        self.kv.free(7)
        return torch.cat(rows).cpu()


@dataclass
class Reference:
    """A saved model, the tokens that Transformers ran through it (a prompt, then greedy ones) and its logits [T, V]."""

    path: Path
    tokens: list[int]
    logits: Tensor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks are threads already; torch's own would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp(request.param)
    return transformers_run(tiny_model(request.param, path), path)


@torch.inference_mode()
def transformers_run(model: Any, path: Path, prompt_tokens: int = PROMPT_TOKENS) -> Reference:
    tokens = torch.randint(VOCAB, (prompt_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    out = model(torch.tensor([tokens]), use_cache=True)
    rows = [out.logits[0]]
    for _ in range(NEW_TOKENS):
        tokens.append(int(rows[-1][-1].argmax()))
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0])
    return Reference(path, tokens, torch.cat(rows))


def test_reference_tells_models_apart(reference: Reference) -> None:
    """Logits of size 1 to 10 that move with the position: otherwise 1e-4 would prove nothing."""
    assert 0.5 < reference.logits.std() < 10
    assert reference.logits.std(0).mean() > 0.3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("chunk", [PROMPT_TOKENS, 7])
def test_logits_equal_transformers(reference: Reference, chunk: int, device: str) -> None:
    logits = Ours(reference.path, SoloComm(), device).logits(reference.tokens, PROMPT_TOKENS, chunk)
    torch.testing.assert_close(logits, reference.logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_transformers(reference: Reference, world: int) -> None:
    ranks = run_ranks(world, lambda comm: Ours(reference.path, comm).logits(reference.tokens, PROMPT_TOKENS, 7))
    torch.testing.assert_close(ranks[0], reference.logits, atol=TOLERANCE, rtol=0)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])


def test_a_plan_predicts_what_a_pass_reads(reference: Reference) -> None:
    ours = Ours(reference.path, SoloComm())
    weights = ours.decoder.weights
    assert isinstance(weights, DenseWeights)
    assert pass_bytes(ours.decoder.spec, 4) == weights.bytes


def test_dynamic_rope_length_is_the_prompts_whatever_the_chunks(tmp_path: Path) -> None:
    """Beyond the original context a prompt's first tokens are rotated for its whole length, in whatever chunk they come."""
    run = transformers_run(tiny_model("llama-dynamic", tmp_path), tmp_path)
    ours = Ours(tmp_path, SoloComm())
    torch.testing.assert_close(ours.logits(run.tokens, PROMPT_TOKENS, 3), run.logits, atol=TOLERANCE, rtol=0)
    as_if_decoded = ours.logits(run.tokens, 1, 1)
    assert (as_if_decoded - run.logits).abs().max() > 100 * TOLERANCE


def test_falcon_alibi_where_bfloat16_cannot_count(tmp_path: Path) -> None:
    """Beyond position 256 bfloat16 rounds key positions themselves; the bias is made of the rounded ones."""
    run = transformers_run(tiny_model("falcon-rw", tmp_path, max_position_embeddings=512), tmp_path, prompt_tokens=350)
    logits = Ours(tmp_path, SoloComm()).logits(run.tokens, prompt=350, chunk=128)
    torch.testing.assert_close(logits, run.logits, atol=TOLERANCE, rtol=0)


def test_mpt_alibi_bias_max(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.23 reads alibi_bias_max and forgets to use it (mpt-7b-storywriter has 16); here it is told."""
    model = tiny_model("mpt-12-heads", tmp_path, attn_config={"alibi_bias_max": 16})
    monkeypatch.setattr(model.transformer, "build_mpt_alibi_tensor", partial(build_mpt_alibi_tensor, alibi_bias_max=16))
    run = transformers_run(model, tmp_path)
    logits = Ours(tmp_path, SoloComm()).logits(run.tokens, PROMPT_TOKENS, 7)
    torch.testing.assert_close(logits, run.logits, atol=TOLERANCE, rtol=0)
