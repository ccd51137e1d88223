"""A view that shares the full store: what it shows after any history is what a store of its own would."""

from __future__ import annotations

import pytest
import torch
from test_kv_views import SPECS, History, Model, paged, step
from torch import Tensor

from rowcast.runtime.kv import PagedKV, SharedKV


def said(kv: PagedKV) -> tuple[object, ...]:
    """What a store says of its sequence."""
    queries = kv.queries(0, 8)
    summaries = [part for kind in kv._summaries for part in kv.summary(0, kind)]
    tensors: list[Tensor] = summaries if queries is None else [*summaries, queries]
    return kv.length(0), kv.end(0), kv.rewinds(0), kv.bytes_read(0), [tensor.clone() for tensor in tensors]


def same(before: tuple[object, ...], after: tuple[object, ...]) -> bool:
    *numbers, tensors = before
    *others, found = after
    assert isinstance(tensors, list) and isinstance(found, list)
    return numbers == others and all(torch.equal(a, b) for a, b in zip(tensors, found, strict=True))


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_random_histories_equal_a_fresh_view(kind: str, seed: int) -> None:
    spec = SPECS[kind]
    history = History(Model(spec), paged(spec), seed)
    view, other = SharedKV(history.full), SharedKV(history.full)
    for each in (view, other):
        assert each.admit(0)
    history.prefill(history.coins.randint(1, 40))
    for _ in range(12):
        before = said(history.full)
        drafted = history.draft(history.coins.choice((view, other)))
        assert same(before, said(history.full))
        history.verify(drafted)
        for each in (view, other):
            each.commit(0, 0)
            assert each.length(0) == each.end(0) == len(history.ids)
    fresh = paged(spec)
    history.model.run(fresh, [step(history.ids, 0)])
    fresh.commit(0, len(history.ids))
    tail = history.tokens(4)
    found = history.model.run(view, [step(tail, len(history.ids), history.table)])
    expected = history.model.run(fresh, [step(tail, len(history.ids))])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert view.bytes_read(0) == fresh.bytes_read(0)


def test_proposals_are_its_own_and_end_with_the_parents_length() -> None:
    spec = SPECS["plain"]
    history = History(Model(spec), paged(spec), 0)
    view, other = SharedKV(history.full), SharedKV(history.full)
    assert view.seq_ids == set() and view.admit(0) and other.admit(0)
    history.prefill(9)
    history.model.run(view, [step(history.tokens(4), 9, history.table)])
    assert (view.length(0), view.end(0), other.end(0), history.full.end(0)) == (9, 13, 9, 9)
    view.rollback(0, 11)
    assert view.end(0) == 11
    for length in (8, 12):
        with pytest.raises(ValueError, match="cannot roll"):
            view.rollback(0, length)
    history.verify(history.tokens(2))
    assert view.end(0) == view.length(0) == history.full.length(0)
    history.full.rollback(0, 5)
    assert view.end(0) == 5
    view.free(0)
    assert view.seq_ids == set() and history.full.length(0) == 5
