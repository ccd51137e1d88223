"""Philox4x32-10 against Random123's known answers, and what its keying promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rowcast.runtime.philox import Purpose, gumbel, philox4x32, uniform32

KNOWN = [  # Random123 1.14, kat_vectors: counter, key, answer
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def row(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (row(word) for word in words(counter))
    k0, k1 = (row(word) for word in words(key))
    assert [int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))] == words(answer)


def reference(seed: int, sample: int, position: int, stream: int, token: int) -> int:
    """One word, in Python integers."""
    c, k = [token // 4, position, stream, sample], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[token % 4]


def test_key_and_counter_layout() -> None:
    seeds, samples, positions = [2**63 - 1, 5, 2**32], [0, 3, 1], [0, 131071, 7]
    got = uniform32(row(*seeds), row(*samples), row(*positions), range(3, 14), rung=2, round_index=9)
    stream = 0 | 2 << 8 | 9 << 16
    rows = zip(seeds, samples, positions, strict=True)
    assert got.tolist() == [[reference(seed, sample, at, stream, i) for i in range(3, 14)] for seed, sample, at in rows]


def test_rungs_and_rounds_may_differ_by_row() -> None:
    one, rounds, rungs = row(1, 1, 1), row(0, 65535, 7), row(0, 3, 255)
    got = uniform32(one, one, one, range(5), purpose=Purpose.ACCEPT, rung=rungs, round_index=rounds)
    for i, (rung, number) in enumerate(zip(rungs.tolist(), rounds.tolist(), strict=True)):
        alone = uniform32(row(1), row(1), row(1), range(5), purpose=Purpose.ACCEPT, rung=rung, round_index=number)
        assert torch.equal(got[i], alone[0])
        assert got[i].tolist() == [reference(1, 1, 1, 1 | rung << 8 | number << 16, token) for token in range(5)]


def test_a_shard_or_a_list_of_ids_sees_the_slice_of_the_whole() -> None:
    seeds, samples, positions = row(1, 2**40 + 3), row(0, 1), row(9, 10)
    whole = gumbel(seeds, samples, positions, range(1000))
    for start, stop in [(0, 250), (1, 2), (250, 503), (503, 1000), (997, 1000)]:
        assert torch.equal(gumbel(seeds, samples, positions, range(start, stop)), whole[:, start:stop])
    ids = torch.tensor([[5, 999, 0, 5], [2, 3, 4, 998]])
    assert torch.equal(gumbel(seeds, samples, positions, ids), whole.gather(1, ids))
    assert torch.equal(gumbel(seeds[1:], samples[1:], positions[1:], range(1000)), whole[1:])


@pytest.mark.parametrize("changed", ["seed", "sample", "position", "rung", "round_index"])
def test_every_part_of_the_key_matters(changed: str) -> None:
    def draw(seed: int = 1, sample: int = 0, position: int = 5, rung: int = 0, round_index: int = 0) -> Tensor:
        return uniform32(row(seed), row(sample), row(position), range(4096), rung=rung, round_index=round_index)

    other = draw(**{changed: 2})
    assert (draw() == other).sum() <= 1
    a, b = draw().double(), other.double()
    assert abs(float(torch.corrcoef(torch.cat([a, b]))[0, 1])) < 0.06


def test_high_seed_bits_matter() -> None:
    assert not torch.equal(uniform32(row(1), row(0), row(0), range(8)), uniform32(row(1 + 2**32), row(0), row(0), range(8)))


def test_gumbel_moments_and_range() -> None:
    rows = torch.arange(100)
    noise = gumbel(torch.full((100,), 42), torch.zeros_like(rows), rows, range(10_000))
    assert noise.dtype == torch.float64
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * 1.2825 / 1000)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.01)
    assert -3.14 < float(noise.min()) < float(noise.max()) < 22.88
    # P(max < x) = exp(-n exp(-x)) for n = 10^6.
    assert 12.0 < float(noise.max()) < 21.0
    assert len(set(noise.flatten().tolist())) > 999_800  # of 2**32 values: about 116 collisions
