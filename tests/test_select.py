"""Each token's own set: the best of every shard, ties to the lower index, and the union over tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import level, reference, seed  # noqa: F401
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import select
from rowcast.runtime.shard import Shard


def best(scores: list[float], keep: int) -> set[int]:
    """By the definition: higher scores first, then lower indices."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_top_mask_by_definition(data: st.DataObject) -> None:
    total, shards = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    keep = data.draw(st.integers(0, total))
    score = st.one_of(st.integers(-3, 3).map(float), st.sampled_from([-0.0, float("inf"), float("-inf"), 1e-40, -1e-40]))
    scores = data.draw(st.lists(score, min_size=total, max_size=total))
    mask = select.top_mask(torch.tensor([scores, scores[::-1]]), keep, shards)
    assert mask.sum(1).tolist() == [keep, keep]
    spans = select.shard_spans(total, keep, shards)
    for span, count in spans:
        assert 0 <= count <= span.stop - span.start
        assert set(mask[0, span].nonzero().flatten().tolist()) == best(scores[span], count)
    sizes = [span.stop - span.start for span, _ in spans]
    assert sum(sizes) == total and max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("keep", [0, 1, 768, 1001, 1536])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_native_equals_torch(tokens: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for scores in (torch.randn(tokens, 1536), torch.randn(tokens, 1537).mul(2).round(), torch.randn(tokens, 4001)[:, ::2]):
        mask = select.top_mask(scores, keep)
        assert torch.equal(mask, reference(partial(select.top_mask, scores, keep), monkeypatch))
        check_union(mask, *select.union(mask))
        check_union(mask, *select.top_union(scores, keep))


def check_union(mask: Tensor, ids: Tensor, own: Tensor | None) -> None:
    assert ids.dtype == torch.int64
    assert torch.equal(ids, mask.any(0).nonzero().flatten())
    if mask.shape[0] == 1:
        assert own is None
    else:
        assert own is not None and torch.equal(own, mask[:, ids])


def test_shards_are_the_ranks_shares() -> None:
    """A rank of 2, 4 or 8 chooses what one rank would have chosen for its share."""
    scores = torch.randn(2, 1536)
    whole = select.top_mask(scores, 600)
    for world in (2, 4, 8):
        shares = [Shard(rank, world).span(1536) for rank in range(world)]
        kept = [Shard(rank, world).span(600) for rank in range(world)]
        parts = [select.top_mask(scores[:, s], k.stop - k.start, 8 // world) for s, k in zip(shares, kept, strict=True)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_nothing_to_choose_from() -> None:
    assert select.top_mask(torch.zeros(2, 0), 0).shape == (2, 0)
    ids, own = select.top_union(torch.zeros(1, 0), 0)
    assert len(ids) == 0 and own is None


def test_above() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    assert select.above(scores, 1.0).tolist() == [[False, False, True], [True, False, False]]
    assert select.above(scores, torch.tensor([-1.0, 0.5, 5.0])).tolist() == [[True, True, False], [True, True, False]]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="keep is 9, it must lie between 0 and 8, the number of scores"):
        select.top_mask(torch.randn(1, 8), 9)
    with pytest.raises(UserError, match="shards is 0, it must be at least 1"):
        select.top_mask(torch.randn(1, 8), 4, 0)
