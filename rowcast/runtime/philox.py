"""Random numbers that depend on the request alone: Philox4x32-10 (Salmon et al., SC11) in torch integers, on any device.

A draw is a function of (seed, sample index, position, purpose, token id). It does not know the batch, the part of the
vocabulary a rank holds or what was drawn before, so a replayed, batched or sharded request sees the same numbers.

Key: the seed's low and high words. Counter: token id // 4, position, purpose | rung << 8 | round << 16, sample index. Of the
four words that come out, the token takes word token id % 4.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """What a number is drawn for; one byte of the counter. Different purposes give independent numbers."""

    TOKEN = 0
    """The Gumbel noise that draws a token. Under coupled verification all rungs and rounds share it."""
    ACCEPT = 1
    """The coin that a proposal is accepted by, under rejection sampling."""
    RESIDUAL = 2
    """The Gumbel noise of the verifier's own token, under rejection sampling."""


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four output words of Philox4x32-10. All tensors int64 holding 32-bit words, of shapes that broadcast together.

    A word that does not vary along a dimension is best passed with size 1 there: the first rounds then skip most of the work.
    Does not modify its arguments.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 64-bit products wrap, which keeps all 64 bits. The low word's garbage above bit 31 is masked after the xor that uses it.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ k0 ^ c1).bitwise_and_(_WORD)
        c2 = ((p0 >> 32) ^ k1 ^ c3).bitwise_and_(_WORD)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def uniform32(
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
    token_ids: range | Tensor,
    *,
    purpose: Purpose = Purpose.TOKEN,
    rung: int | Tensor = 0,
    round_index: int | Tensor = 0,
) -> Tensor:
    """Uniform 32-bit words, one for each row and token. seeds, sample_index, positions [B] int64 -> [B, n] int64 in [0, 2**32).

    `token_ids` is a contiguous range (a vocabulary shard), the same for all rows, or ids [B, n] int64. Seeds use all 64 bits.
    Preconditions: sample indices and positions in [0, 2**32), 0 <= rung < 256, 0 <= round_index < 65536, both [B] int64 if tensors.
    """
    assert isinstance(rung, Tensor) or 0 <= rung < 1 << 8
    assert isinstance(round_index, Tensor) or 0 <= round_index < 1 << 16
    if isinstance(token_ids, range):
        assert token_ids.step == 1
        groups = torch.arange(token_ids.start // 4, (token_ids.stop + 3) // 4, device=seeds.device)[None]  # [1, G]
    else:
        groups = token_ids >> 2  # [B, n]
    seed, position, sample = seeds[:, None], positions[:, None], sample_index[:, None]
    stream = (torch.full_like(positions, purpose) | rung << 8 | round_index << 16)[:, None]
    words = torch.stack(philox4x32((groups, position, stream, sample), (seed & _WORD, (seed >> 32) & _WORD)), -1)  # [B, G, 4]
    if isinstance(token_ids, range):
        return words.flatten(1)[:, token_ids.start % 4 :][:, : len(token_ids)]
    return words.gather(-1, (token_ids & 3)[..., None])[..., 0]


def unit(words: Tensor) -> Tensor:
    """32-bit words -> (word + 1/2) / 2**32 in (0, 1), float64, of the same shape."""
    return words.double().add_(0.5).mul_(2.0**-32)


def gumbel(
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
    token_ids: range | Tensor,
    *,
    purpose: Purpose = Purpose.TOKEN,
    rung: int | Tensor = 0,
    round_index: int | Tensor = 0,
) -> Tensor:
    """Standard Gumbel noise -log(-log(u)), u = (word + 1/2) / 2**32; arguments as for `uniform32`. -> [B, n] float64.

    float64 because the largest values decide: there u is within 2**-33 of 1, which float32 cannot tell from 1. Values lie in
    (-3.14, 22.88).
    """
    words = uniform32(seeds, sample_index, positions, token_ids, purpose=purpose, rung=rung, round_index=round_index)
    return unit(words).log_().neg_().log_().neg_()
