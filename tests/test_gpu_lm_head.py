"""The certified head on the device: the dense top-k, on easy heads and on hard ones, and a full product where lists overflow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import native
from rowcast.kernels.gpu import lm_head, lowbit
from rowcast.kernels.gpu.lm_head import Capacities, Found, Stage
from rowcast.runtime.sparse.lm_head import CertifiedHead, directions

take_arrays_as_bounds()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V, E, M = 600, 128, 8


def easy(tokens: int, dtype: torch.dtype, seed: int = 0, rows: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, hidden states that lie mostly along some directions and have a few rows that stand out, and the directions."""
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(rows, E, generator=g) / E**0.5
    basis = torch.linalg.qr(torch.randn(E, M, generator=g)).Q.T.contiguous()
    along = torch.randn(tokens, M, generator=g)
    along[:, 0] += 12
    h = along @ basis + torch.randn(tokens, E, generator=g) * 0.2
    best = torch.randint(rows, (tokens, 3), generator=g)
    h += 3 * head[best].sum(1)
    return (
        head.to(dtype),
        h.to(dtype),
        directions(h.float().T @ h.float() / tokens, h.float().mean(0), M) if tokens > M else basis,
    )


def search(
    rows: Tensor, h: Tensor, basis: Tensor, bits: Sequence[int], k: int, capacities: Capacities | None = None
) -> tuple[Found, CertifiedHead]:
    built = CertifiedHead(rows.to(DEVICE), bits=bits, directions=basis.to(DEVICE) if len(basis) else None)
    stages = [Stage(stage.proxy, stage.correction, stage.radii) for stage in built.stages]
    return lm_head.top(rows.to(DEVICE), stages, built.directions, h.to(DEVICE), k, capacities), built


def dense(rows: Tensor, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By float64, rounded once; of equal values the lower id is first."""
    logits = (h.double() @ rows.double().T).to(h.dtype)
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :k].float(), ids[:, :k]


def assert_dense(found: Found, rows: Tensor, h: Tensor, k: int) -> None:
    """Ids may differ where float32 sums round to the other side."""
    values, _ = dense(rows, h, k)
    tolerance = 1e-5 if h.dtype == torch.float32 else torch.finfo(h.dtype).eps * 1.01
    torch.testing.assert_close(found.values.cpu(), values, rtol=tolerance, atol=tolerance)
    mine = (h.double() @ rows.double().T).gather(1, found.ids.cpu()).float()
    torch.testing.assert_close(found.values.cpu(), mine, rtol=tolerance, atol=tolerance)
    assert all(len(set(ids)) == k for ids in found.ids.tolist())


@pytest.mark.parametrize(
    ("dtype", "bits", "k"),
    [
        (torch.float32, (4, 3), 5),
        (torch.bfloat16, (4, 3), 1),
        (torch.bfloat16, (8,), 5),
        pytest.param(torch.float16, (4, 3), 5, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_top_is_the_dense_top(dtype: torch.dtype, bits: tuple[int, ...], k: int) -> None:
    rows, h, basis = easy(3, dtype)
    found, built = search(rows, h, basis, bits, k)
    assert_dense(found, rows, h, k)
    assert not found.fallback.any()
    reference = built.top(h.to(DEVICE), k)
    # The threshold by groups keeps a few rows more.
    assert (found.rescored >= k).all() and (found.rescored <= 2 * reference.rescored + 64).all()


def test_many_wanted_and_three_stages() -> None:
    rows, h, basis = easy(2, torch.float32, 1)
    assert_dense(search(rows, h, basis, (2, 2, 4), 20, Capacities(V, V))[0], rows, h, 20)


def test_without_directions_and_a_row_count_that_no_tile_divides() -> None:
    rows, h, _ = easy(1, torch.bfloat16, 2, 377)
    found = search(rows, h, torch.empty(0, E), (8,), 1)[0]
    assert_dense(found, rows, h, 1)
    assert not found.fallback.any()


@pytest.mark.parametrize("bits", [(4, 3), (3,)], ids=str)
def test_overflow_reads_all_rows(bits: tuple[int, ...]) -> None:
    """Lists of any length that are too short, the first and the last."""
    rows, h, basis = easy(3, torch.bfloat16, 3)
    for k, capacities in ((1, Capacities(1, V)), (5, Capacities(V, 4)))[2 - len(bits) :]:
        found = search(rows, h, basis, bits, k, capacities)[0]
        assert_dense(found, rows, h, k)
        assert found.fallback.all() and (found.rescored == V).all()


def test_a_list_that_is_just_long_enough() -> None:
    rows, h, basis = easy(1, torch.bfloat16, 4)
    exact = int(search(rows, h, basis, (4,), 5)[0].rescored[0])
    assert not search(rows, h, basis, (4,), 5, Capacities(V, exact))[0].fallback.any()
    assert search(rows, h, basis, (4,), 5, Capacities(V, exact - 1))[0].fallback.all()


def test_hard_inputs() -> None:
    """Ties, zeros, tiny and infinite hidden states, NaN: everything is kept, so everything is read."""
    rows, h, basis = easy(5, torch.float32, 5)
    rows[40] = 0
    rows[40, 7] = 8  # one product: exact in any order of the others
    rows[300] = rows[533] = rows[40]
    h[0] = 40 * rows[40]
    h[1] = 0
    h[2] *= 1e-13
    h[3, 5] = torch.nan
    found = search(rows, h, basis, (4, 3), 3)[0]
    assert found.fallback.all()
    assert found.ids[0].tolist() == [40, 300, 533]
    assert found.ids[1].tolist() == [0, 1, 2] and found.values[1].tolist() == [0, 0, 0]
    assert found.values[3].isnan().all() and found.ids[3].tolist() == [0, 1, 2]
    others = [2, 4]
    assert torch.equal(found.ids[others].cpu(), dense(rows, h, 3)[1][others])
    assert search(rows, h[:1], basis, (4, 3), 2)[0].ids.tolist() == [[40, 300]]


def test_a_token_does_not_depend_on_the_others() -> None:
    rows, h, basis = easy(7, torch.bfloat16, 6)
    together, _ = search(rows, h, basis, (4, 3), 5)
    alone, _ = search(rows, h[4:5], basis, (4, 3), 5)
    for name in ("values", "ids", "rescored"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[4]), name


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 64])
def test_replays_over_a_large_head(k: int) -> None:
    """Counts change from replay to replay, and some replays overflow."""
    g = torch.Generator(DEVICE).manual_seed(0)
    total, columns, tokens = 30_000, 1024, 4
    rows = (torch.randn(total, columns, device=DEVICE, generator=g) / 32).bfloat16()
    basis = torch.linalg.qr(torch.randn(columns, M, device=DEVICE, generator=g)).Q.T.contiguous()
    built = CertifiedHead(rows, bits=(4, 3), directions=basis)
    stages = [Stage(stage.proxy, stage.correction, stage.radii) for stage in built.stages]
    h = torch.ones(tokens, columns, dtype=torch.bfloat16, device=DEVICE)
    lm_head.top(rows, stages, basis, h, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lm_head.top(rows, stages, basis, h, k)
    overflows = set()
    for trial in range(8):
        noise = 0.05 if trial % 4 else 5.0
        along = torch.randn(tokens, M, device=DEVICE, generator=g)
        best = torch.randint(total, (tokens,), device=DEVICE, generator=g)
        h.copy_(along @ basis + noise * torch.randn(tokens, columns, device=DEVICE, generator=g) + 6 * rows[best].float())
        graph.replay()
        values = (h.double() @ rows.double().T).topk(k, dim=1).values.float()
        torch.testing.assert_close(found.values, values, rtol=0.0079, atol=0.0079)
        overflows |= set(found.fallback.tolist())
    assert overflows == {True, False} or k == 64


@pytest.mark.parametrize(
    ("dtype", "bits", "k", "capacities"),
    [
        (torch.float32, (4, 3), 1, None),
        (torch.float32, (2, 2, 4), 20, Capacities(V, V)),
        (torch.bfloat16, (8,), 5, None),
        (torch.float32, (4, 3), 1, Capacities(1, V)),
        (torch.bfloat16, (4, 3), 5, Capacities(V, 4)),
    ],
    ids=["two", "three", "one", "first overflows", "last overflows"],
)
def test_all_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: tuple[int, ...], k: int, capacities: Capacities | None
) -> None:
    """The best are exact, the others those of the reference and below them; where a list overflows all are the dense ones."""
    rows, h, basis = easy(3, dtype, 7)
    built = CertifiedHead(rows.to(DEVICE), bits=bits, directions=basis.to(DEVICE))
    stages = [Stage(stage.proxy, stage.correction, stage.radii) for stage in built.stages]
    found = lm_head.logits(rows.to(DEVICE), stages, built.directions, h.to(DEVICE), k, capacities)
    values, ids = dense(rows, h, k)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 1.01
    best = found.values.cpu().topk(k)
    torch.testing.assert_close(best.values, values, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.values.cpu().argmax(1), ids[:, 0])
    *refined, listed, of_all = found.counts.tolist()
    if capacities and min(capacities.refined, capacities.exact) < V:
        assert (listed, of_all) == (0, V)
        assert all(stage <= capacities.refined for stage in refined)
    else:
        assert k <= listed < V and not of_all
    whole = (h.double() @ rows.double().T).float()
    if of_all:
        torch.testing.assert_close(found.values.cpu(), whole, rtol=2 * tolerance, atol=2 * tolerance)
    else:
        _, radius = built.bounds(h.to(DEVICE))
        assert ((found.values - whole.to(DEVICE)).abs() <= radius + 1e-4).all()
        monkeypatch.setattr(native, "library", lambda: None)  # whose inputs may be in fixed point
        reference = built.logits(h.to(DEVICE), k).float()
        # The threshold by groups keeps a few rows more.
        assert ((found.values - reference).abs() < 2 * tolerance * (1 + reference.abs())).float().mean() > 0.95


def test_a_stage_behind_a_list_that_overflowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads rows that there are, though nothing was listed for it; and no more of them than its list has places."""
    rows, h, basis = easy(2, torch.float32, 9)
    built = CertifiedHead(rows.to(DEVICE), bits=(2, 2, 4), directions=basis.to(DEVICE))
    stages = [Stage(stage.proxy, stage.correction, stage.radii) for stage in built.stages]
    product, empty, looked = lowbit._run, lm_head._New.int32, []

    def watched(*args: Any, ids: Tensor | None = None, count: Tensor | None = None, **options: Any) -> Tensor:
        if ids is not None and count is not None:
            looked.append(min(int(count[0]), len(ids)))
            assert not looked[-1] or 0 <= int(ids[: looked[-1]].min()) <= int(ids[: looked[-1]].max()) < V
        return product(*args, ids=ids, count=count, **options)

    monkeypatch.setattr(lowbit, "_run", watched)
    monkeypatch.setattr(lm_head._New, "int32", lambda self, *shape: empty(self, *shape).fill_(1 << 30))
    found = lm_head.logits(rows.to(DEVICE), stages, built.directions, h.to(DEVICE), 3, Capacities(7, V))
    assert looked == [7, 7] and found.counts.tolist() == [7, 7, 0, V]
    torch.testing.assert_close(found.values.cpu(), h @ rows.T, rtol=1e-5, atol=1e-5)
