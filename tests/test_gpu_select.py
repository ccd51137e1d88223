"""Selection on a GPU (in Triton's interpreter without one) against the torch reference."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import select as reference
from rowcast.kernels.gpu import select
from rowcast.kernels.gpu.heads import choose_heads
from rowcast.kernels.gpu.select import Chosen, Places

take_arrays_as_bounds()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [Places.of(256, 26, 2), Places((100, 140, 7), (5, 140, 0))]


def random_scores(tokens: int, total: int, kind: str = "normal", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, total, generator=generator)
    if kind == "ties":
        scores = scores.mul(2).round()
    elif kind == "extreme":
        scores = scores * 10.0 ** torch.randint(-38, 38, scores.shape, generator=generator)
        scores[:, ::7], scores[:, 1::7], scores[:, 2::7] = -0.0, 0.0, float("-inf")
    return scores.to(DEVICE)


def expected_mask(scores: Tensor, places: Places) -> Tensor:
    """By sorting."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for start, size, kept in zip(accumulate((0, *places.sizes)), places.sizes, places.kept, strict=False):
        best = scores[:, start : start + size].sort(dim=-1, descending=True, stable=True).indices[:, :kept] + start
        mask.scatter_(1, best, True)
    return mask


def check(chosen: Chosen, mask: Tensor) -> None:
    ids = mask.any(0).nonzero()[:, 0]
    count = int(chosen.count)
    assert count == len(ids) <= len(chosen.ids)
    assert chosen.ids.dtype == torch.int32 and torch.equal(chosen.ids[:count].long(), ids)
    if chosen.own is None:
        assert len(mask) == 1
    else:
        assert torch.equal(chosen.own[:, :count], mask[:, ids])


@pytest.mark.parametrize("kind", ["normal", "ties", "extreme"])
@pytest.mark.parametrize("places", SHAPES, ids=str)
def test_top(places: Places, kind: str) -> None:
    for tokens in (1, 2):
        scores = random_scores(tokens, places.total, kind)
        chosen, mask = select.top_ids(scores, places), expected_mask(scores, places)
        check(chosen, mask)
        assert torch.equal(select.top_mask(scores, places), mask)
        assert chosen.starts is not None
        used = mask.any(0).cpu()
        starts = [int(used[:bound].sum()) for bound in accumulate((0, *places.sizes))]
        assert chosen.starts.tolist() == starts


@pytest.mark.parametrize("keep", [0, 1, 700])
def test_top_is_the_references(keep: int) -> None:
    scores = random_scores(1, 700, "ties")
    check(select.top_ids(scores, Places.of(700, keep)), reference.top_mask(scores, keep))


def test_equal_scores() -> None:
    places = Places.of(128, 20, 2)
    for values in ((3.0, 3.0), (-0.0, 0.0)):
        scores = torch.tensor(values, device=DEVICE).repeat(2, 64)
        check(select.top_ids(scores, places), expected_mask(scores, places))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("vector", [False, True])
def test_above(tokens: int, vector: bool) -> None:
    scores = random_scores(tokens, 2500)
    for least in (1.3, 100.0):
        threshold = random_scores(1, 2500, seed=9)[0] + least if vector else least
        check(select.above_ids(scores, threshold), reference.above(scores, threshold))


@pytest.mark.parametrize(
    ("first", "places"),
    [(Places.of(500, 75, 2), Places.of(500, 50, 2)), (Places((100, 140, 7), (10, 140, 0)), Places((100, 140, 7), (5, 90, 0)))],
    ids=str,
)
def test_rerank(first: Places, places: Places) -> None:
    for tokens, kind in ((1, "normal"), (2, "ties")):
        chosen = select.top_ids(random_scores(tokens, first.total, kind), first)
        count, capacity = int(chosen.count), len(chosen.ids)
        hidden = random_scores(tokens, capacity, kind, seed=2)
        norms = random_scores(1, first.total, seed=3)[0].abs()
        ids = chosen.ids[:count].long()
        for exact, given in ((hidden, None), (hidden, norms)):
            values = exact[:, :count] if given is None else exact[:, :count].abs() * given[ids]
            own = torch.ones_like(values, dtype=torch.bool) if chosen.own is None else chosen.own[:, :count]
            full = torch.full((tokens, first.total), float("-inf"), device=DEVICE)
            full[:, ids] = values.masked_fill(~own, float("-inf"))
            mask = expected_mask(full, places)[:, ids]
            kept = select.rerank(exact, chosen, places, given)
            assert torch.equal(kept[:, :count], mask) and not kept[:, count:].any()
        if tokens == 1:
            kept_ids, kept_count, kept_hidden = select.rerank_one(hidden.bfloat16(), chosen, places, norms)
            kept = select.rerank(hidden.bfloat16(), chosen, places, norms)[0, :count]
            assert int(kept_count) == places.keep and torch.equal(kept_ids.long(), ids[kept])
            assert torch.equal(kept_hidden[0], hidden.bfloat16()[0, :count][kept])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
@pytest.mark.parametrize(("total", "keep"), [(12288, 1229), (14336, 717), (49152, 4915), (16384, 819)])
def test_sizes_of_models(total: int, keep: int, tokens: int) -> None:
    places = Places.of(total, keep)
    for kind in ("normal", "ties", "extreme"):
        scores = random_scores(tokens, total, kind)
        check(select.top_ids(scores, places), expected_mask(scores, places))
        check(select.above_ids(scores, 1.0), scores > 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
def test_replays(tokens: int) -> None:
    places = Places.of(12288, 1229)
    scores = random_scores(tokens, 12288)
    select.top_ids(scores, places), select.above_ids(scores, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top, above = select.top_ids(scores, places), select.above_ids(scores, 1.0)
    for seed in range(5):
        scores.copy_(random_scores(tokens, 12288, seed=seed) * (1 + seed))
        graph.replay()
        check(top, expected_mask(scores, places))
        check(above, scores > 1.0)


@pytest.mark.parametrize("broken", ["some", "all"])
def test_heads_of_scores_that_are_no_numbers(broken: str) -> None:
    """As many are chosen as have a place: what lies behind stays as it is. Numbers go first."""
    scores = torch.tensor([[float("nan"), 1.0, 3.0, float("nan"), 2.0, float("nan"), float("nan"), 0.0]], device=DEVICE)
    if broken == "all":
        scores.fill_(float("nan"))
    shards = torch.tensor([[0] * 4 + [1] * 4, [2] * 8], dtype=torch.int32, device=DEVICE)
    chosen, rows, late = choose_heads(scores, shards, 4, 16, late=True)
    expected = [0, 1, 4, 5] if broken == "all" else [1, 2, 4, 7]
    assert chosen.ids.tolist() == expected and chosen.count.tolist() == [4]
    assert rows.rows.tolist() == [head * 16 + element for head in expected for element in range(16)]
    assert late is not None and late.heads.tolist() == expected
