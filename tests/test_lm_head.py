"""The certified LM head: its bounds hold, its top-k is the dense one, and where it cannot know it reads everything and says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import lowbit, native
from rowcast.runtime.sparse.lm_head import CertifiedHead, choose, directions

V, E, T = 4200, 160, 6
"""More rows than are built at once, and columns that need padding."""
LIBRARY_SUMS: Any = {} if native.library() is not None else {"rtol": 1e-5, "atol": 1e-4}
"""How near a library's products are for other numbers of tokens; the native part gives each token the same bits."""
BITS: list[tuple[int, ...]] = [(2,), (3,), (4,), (8,), (4, 3), (2, 2, 4)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def structured(generator: torch.Generator, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, a sample of hidden states and T others of the same law: a mean, 8 strong directions and a little of all others."""
    rows = torch.randn(V, E, generator=generator)
    mixing = torch.randn(8, E, generator=generator) * 2
    mean = torch.randn(E, generator=generator) * 3

    def draw(count: int) -> Tensor:
        noise = torch.randn(count, E, generator=generator) * 0.3
        return mean + torch.randn(count, 8, generator=generator) @ mixing + noise

    return rows, draw(tokens), draw(T)


def fitted(sample: Tensor, count: int) -> Tensor:
    return directions(sample.T @ sample / len(sample), sample.mean(0), count)


def dense_top(rows: Tensor, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = F.linear(h, rows).float().sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_top_is_the_dense_top(bits: tuple[int, ...], generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    for basis, capacity in ((None, 0.125), (fitted(sample, 9), 0.125), (None, 1.0), (None, 0.0)):
        head = CertifiedHead(rows, bits=bits, directions=basis, capacity=capacity)
        for k in (1, 5, 64):
            top, (values, ids) = head.top(h, k), dense_top(rows, h, k)
            assert torch.equal(top.ids, ids)
            torch.testing.assert_close(top.values, values)
            assert (top.rescored[top.fallback] == V).all()
            assert (top.rescored[~top.fallback] <= max(capacity * V, 2 * k)).all()
            assert top.fallback.all() or capacity > 0


def hard_heads(generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows, h = torch.randn(V, E, generator=generator), torch.randn(T, E, generator=generator)
    yield "normal", rows, h
    tails = torch.randn(V, E, generator=generator) / torch.randn(V, E, generator=generator).abs().clamp_min(1e-3)
    yield "heavy-tailed rows", tails, h
    yield "rows of very different lengths", rows * torch.logspace(-6, 4, V)[:, None], h
    outlier = torch.ones(E)
    outlier[3] = 1000
    yield "outlier column", rows * outlier, h * outlier.flip(0)
    yield "outlier input", rows, h * outlier
    yield "rows that a proxy holds exactly", lowbit.dequantise(lowbit.quantise(rows, 2)), h
    yield "zeros", torch.zeros(V, E), h


def test_bounds_hold_for_every_row(generator: torch.Generator) -> None:
    for name, rows, h in hard_heads(generator):
        for bits in ((2,), (4,), (8,)):
            for basis in (None, torch.linalg.qr(torch.randn(E, 9, generator=generator)).Q.T):
                estimate, radius = CertifiedHead(rows, bits=bits, directions=basis).bounds(h)
                products = F.linear(h.double(), rows.double()), F.linear(h, rows), F.linear(h.flip(1), rows.flip(1))
                for exact in products:
                    assert ((estimate.double() - exact.double()).abs() <= radius.double()).all(), f"{name}, {bits} bits"
                assert radius.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_cover_logits_that_are_rounded_to_16_bits(dtype: torch.dtype, generator: torch.Generator) -> None:
    rows, h = torch.randn(V, E, generator=generator).to(dtype), torch.randn(T, E, generator=generator).to(dtype)
    head = CertifiedHead(rows, bits=(8,))
    estimate, radius = head.bounds(h)
    assert ((estimate - F.linear(h, rows).float()).abs() <= radius).all()
    top, (values, _) = head.top(h, 8), dense_top(rows, h, 8)
    torch.testing.assert_close(top.values, values, rtol=0, atol=0)
    assert head.logits(h).dtype == dtype


def test_a_second_summation_order_changes_no_candidate(generator: torch.Generator) -> None:
    """Rows that tie but for rounding are all rescored: which is the best is for the exact product to say."""
    rows = torch.randn(V, E, generator=generator)
    h = torch.randn(1, E, generator=generator)
    twins = torch.tensor([17, 4100, 4199])
    rows[twins] = h * 3
    rows[4100, 0] += 1e-7 * float(rows[4100, 0])
    top = CertifiedHead(rows, bits=(4, 3)).top(h)
    assert int(top.rescored) >= 3
    assert int(top.ids) in twins


def test_an_adversarial_head_fails_the_certificate_and_is_read_whole(generator: torch.Generator) -> None:
    """All rows nearly equal: the winner lies far inside what a few bits can tell."""
    common = torch.randn(E, generator=generator)
    rows = common + 1e-4 * torch.randn(V, E, generator=generator)
    h = common + 0.1 * torch.randn(T, E, generator=generator)
    head = CertifiedHead(rows, bits=(4, 3), directions=F.normalize(common, dim=0)[None])
    estimate, _ = head.bounds(h)
    top, (values, ids) = head.top(h), dense_top(rows, h, 1)
    assert (estimate.argmax(1) != ids[:, 0]).any(), "the proxy alone would have been right"
    assert torch.equal(top.ids, ids)
    torch.testing.assert_close(top.values, values)
    assert top.fallback.all()
    reads = head.reads()
    assert reads.fallbacks == T
    assert reads.bytes >= rows.nbytes
    assert head.reads().fallbacks == 0
    torch.testing.assert_close(head.logits(h), F.linear(h, rows))


def test_a_winner_behind_rows_that_the_proxy_overrates_is_found(generator: torch.Generator) -> None:
    """Beside an outlier 2 bits know small weights by their sign only, and take them for large ones."""
    rows, h = torch.randn(V, E, generator=generator) * 0.1, torch.randn(1, E, generator=generator)
    h[0, 0] = 0
    rows[321] = h[0]
    rows[:300] = 1e-3 * h[0]
    rows[:300, 0] = 100
    head = CertifiedHead(rows, bits=(2,))
    estimate, _ = head.bounds(h)
    assert (estimate[0, :300] > estimate[0, 321]).all()
    top = head.top(h)
    assert int(top.ids) == 321
    assert 300 < int(top.rescored) < V


def test_of_equal_logits_the_lower_id_is_first(generator: torch.Generator) -> None:
    rows, _, h = structured(generator, 1)
    rows[V // 2 :] = rows[: V // 2]
    for capacity in (0.0, 1.0):
        top = CertifiedHead(rows, bits=(8,), capacity=capacity).top(h, 6)
        assert (top.ids[:, 1::2] == top.ids[:, ::2] + V // 2).all()


def test_a_token_does_not_see_its_neighbours(generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    h[2] = 0  # Every logit is 0: the certificate fails for this token alone.
    together, alone = (CertifiedHead(rows, bits=(4, 3), directions=fitted(sample, 9), capacity=0.5) for _ in range(2))
    top, logits = together.top(h, 3), together.logits(h, 3)
    assert top.fallback.tolist() == [i == 2 for i in range(T)]
    for i in range(T):
        one = alone.top(h[i : i + 1], 3)
        assert torch.equal(one.ids[0], top.ids[i])
        torch.testing.assert_close(one.values[0], top.values[i])
        assert [int(one.rescored), int(one.bytes)] == [int(top.rescored[i]), int(top.bytes[i])]
        torch.testing.assert_close(alone.logits(h[i : i + 1], 3)[0], logits[i], **LIBRARY_SUMS)


def test_logits_are_exact_at_the_top_and_estimates_elsewhere(generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    head = CertifiedHead(rows, bits=(4, 3), directions=fitted(sample, 9))
    exact, logits = F.linear(h, rows), head.logits(h, 16)
    best = exact.topk(16, dim=1).indices
    torch.testing.assert_close(logits.gather(1, best), exact.gather(1, best))
    assert torch.equal(logits.topk(16, dim=1).indices, best)
    off = (logits - exact).abs()
    assert (off <= head.bounds(h)[1]).all()
    assert (off > 1e-3).any()
    torch.testing.assert_close(CertifiedHead(rows[:20], bits=(4,)).logits(h), exact[:, :20], rtol=1e-5, atol=1e-4)


def test_recall_of_the_proxy_rises_with_what_it_selects(generator: torch.Generator) -> None:
    rows, h = torch.randn(V, E, generator=generator), torch.randn(32, E, generator=generator)
    best = F.linear(h, rows).topk(64, dim=1).indices

    def recall(bits: int, selected: int) -> float:
        chosen = torch.zeros(len(h), V, dtype=torch.bool)
        chosen.scatter_(1, CertifiedHead(rows, bits=(bits,)).bounds(h)[0].topk(selected, dim=1).indices, True)
        return float(chosen.gather(1, best).float().mean())

    by_selected = [recall(2, selected) for selected in (64, 128, 512, V)]
    assert by_selected == sorted(set(by_selected))
    assert by_selected[-1] == 1
    by_bits = [recall(bits, 64) for bits in (2, 3, 4, 8)]
    assert by_bits == sorted(set(by_bits))


def test_directions_are_orthonormal_and_span_what_was_planted(generator: torch.Generator) -> None:
    _, sample, h = structured(generator, 2000)
    basis = fitted(sample, 9)
    torch.testing.assert_close(basis @ basis.T, torch.eye(9), atol=1e-5, rtol=0)
    assert abs(float(basis[0] @ F.normalize(sample.mean(0), dim=0))) == pytest.approx(1, abs=1e-5)
    across = h - h @ basis.T @ basis
    assert float(across.norm() / h.norm()) < 0.15


def test_directions_shrink_the_radius_and_the_bytes(generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    without, with_directions = (CertifiedHead(rows, bits=(4,), directions=basis) for basis in (None, fitted(sample, 9)))
    assert float(with_directions.bounds(h)[1].mean()) < 0.4 * float(without.bounds(h)[1].mean())
    assert int(with_directions.top(h, 64).bytes.sum()) < int(without.top(h, 64).bytes.sum())


def test_bytes_are_those_of_the_proxies_and_of_the_rows_that_were_read_again(generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    basis = fitted(sample, 9)
    head = CertifiedHead(rows, bits=(4,), directions=basis)
    proxy, correction = lowbit.quantise(rows, 4), lowbit.quantise(rows[:, :9], 4)
    assert head.bytes == proxy.bytes + correction.bytes + V * 2 * 4 + basis.nbytes
    top = head.top(h[:1], 64)
    assert int(top.bytes) == head.bytes + int(top.rescored) * E * 4 == head.reads().bytes
    refined = CertifiedHead(rows, bits=(4, 3), directions=basis)
    assert refined.bytes == head.bytes
    assert int(refined.top(h[:1], 64).rescored) < int(top.rescored)


def test_a_hidden_state_that_is_not_a_number_reaches_the_dense_product(generator: torch.Generator) -> None:
    rows, _, h = structured(generator, 1)
    h[1, 4] = torch.nan
    h[2, 4] = torch.inf
    head = CertifiedHead(rows, bits=(4, 3))
    top, logits = head.top(h), head.logits(h)
    assert top.fallback[1:3].all()
    assert torch.equal(top.ids[3:], dense_top(rows, h[3:], 1)[1])
    torch.testing.assert_close(logits[1:3], F.linear(h, rows)[1:3], equal_nan=True)


def test_hidden_states_out_of_the_bounds_range_reach_the_dense_product(generator: torch.Generator) -> None:
    rows, h = torch.randn(V, E, generator=generator), torch.randn(T, E, generator=generator)
    for size in (1e-15, 1e-25, 5e-35, 1e-40):
        head = CertifiedHead(rows, bits=(4, 3))
        estimate, radius = head.bounds(h * size)
        exact = F.linear(h * size, rows)
        assert ((estimate - exact).abs() <= radius).all()
        top = head.top(h * size)
        assert top.fallback.all() and torch.equal(top.ids[:, 0], exact.argmax(1))
    h[:, 64:] *= 5e-35
    estimate, radius = CertifiedHead(rows, bits=(8,)).bounds(h)
    assert radius.isfinite().all() and ((estimate - F.linear(h, rows)).abs() <= radius).all()


def test_a_small_vocabulary_is_not_read_whole(generator: torch.Generator) -> None:
    """An eighth of its rows were fewer than the 64 that are wanted."""
    rows, _, h = structured(generator, 1)
    head = CertifiedHead(rows[:400], bits=(8,))
    head.logits(h)
    assert head.reads().fallbacks == 0


def test_the_setting_that_reads_least_is_chosen(generator: torch.Generator) -> None:
    rows, sample, h = structured(generator, 500)
    basis = fitted(sample, 9)
    options: tuple[tuple[int, ...], ...] = ((3,), (4,))
    shares = {
        (bits, count): float(CertifiedHead(rows, bits=bits, directions=basis[:count]).top(h, 64).bytes.double().mean())
        / rows.nbytes
        for bits in options
        for count in (0, 9)
    }
    chosen = choose(rows, h, basis, k=64, bits=options, counts=(0, 9, 64))
    assert shares[chosen.bits, chosen.directions] == chosen.share == min(shares.values())
    assert chosen.directions == 9


def test_bits_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(UserError, match="5 bits cannot be packed"):
        CertifiedHead(torch.zeros(4, 64), bits=(5,))
