"""Rows of host memory, fetched over the bus by the GPU itself.

A CPU that gathers scattered rows into a buffer for one DMA transfer is several times slower than the bus. Here a few programs read the
rows where they lie, in memory that is pinned and mapped for the GPU, and leave the other multiprocessors free. The bus needs a certain
number of bytes under way, in whatever order: each program asks for its next tile before it stores the last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowcast.kernels.gpu import multiprocessors

UNIT = 16
"""Bytes that one thread reads at a time; rows are multiples of it."""


class Fetch(NamedTuple):
    """How the work is cut."""

    programs: int = 24
    """Each keeps a multiprocessor busy. 16 to 32 saturate the bus; more do not help."""
    tile: int = 16384
    """Bytes that a program asks for at a time, of one row or of several; a power of two. Two tiles of each are under way."""
    piece: int = 2048
    """Bytes of a row that lie together in a tile, at most; a power of two."""
    warps: int = 4


def gather(
    address: int,
    stride: int,
    ids: Tensor,
    count: Tensor,
    out: Tensor,
    fetch: Fetch | None = None,
    places: Tensor | None = None,
) -> None:
    """out[places[i]] = the ids[i]-th row at `address`, for all i < count; other rows of `out` stay as they are.

    `address`: where the device sees the first row, `stride`: bytes from one row to the next, both multiples of `UNIT`. ids [C] int32,
    any order, repeats allowed; all of the first `count` [1] int32 have to be rows that are there, which is not checked. `out` [R, ...],
    contiguous, a row's bytes a multiple of `UNIT`. `places` [C] int32, each once; None: 0, 1, ..., and R is C. A count above C is C.
    """
    capacity, row = ids.shape[0], out[0].nbytes if out.shape[0] else UNIT
    assert address % UNIT == 0 and stride % UNIT == 0 and row % UNIT == 0 and row <= stride
    assert out.is_contiguous() and (places is not None or out.shape[0] == capacity) and out.data_ptr() % UNIT == 0
    assert places is None or (places.dtype == torch.int32 and places.is_contiguous() and places.shape == ids.shape)
    assert ids.dtype == count.dtype == torch.int32 and ids.dim() == 1 and ids.is_contiguous() and count.shape == (1,)
    if capacity == 0:
        return
    fetch = fetch or Fetch()
    piece = min(fetch.piece, triton.next_power_of_2(row))
    pieces = fetch.tile // piece
    programs = min(fetch.programs, multiprocessors(ids.device), triton.cdiv(capacity * triton.cdiv(row, piece), pieces))
    _gather[(programs,)](
        address,
        ids,
        count,
        out.view(torch.uint8),
        places,
        capacity,
        row // 4,
        stride // 4,
        piece // 4,
        pieces,
        num_warps=fetch.warps,
    )


def gather_reference(bank: Tensor, ids: Tensor, count: Tensor, out: Tensor, places: Tensor | None = None) -> None:
    """What `gather` does, with the rows as a tensor: bank [R, ...], out [C, ...] of the same dtype."""
    rows = min(int(count), ids.shape[0])
    found = bank[ids[:rows].long().to(bank.device)].to(out.device)
    if places is None:
        out[:rows] = found
    else:
        out[places[:rows].long()] = found


@triton.jit
def _gather(
    address,
    ids,
    count,
    out,
    places,
    capacity,
    row: tl.constexpr,
    stride: tl.constexpr,
    piece: tl.constexpr,
    pieces: tl.constexpr,
):
    """Tile t is pieces t * `pieces` and on of all rows' pieces, one row after the other. Sizes in words of 4 bytes."""
    bank = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    words = tl.multiple_of(out.to(tl.pointer_type(tl.int32)), 16)
    a_row: tl.constexpr = (row + piece - 1) // piece
    total = tl.minimum(tl.load(count), capacity) * a_row
    step = tl.num_programs(0) * pieces
    first = tl.program_id(0) * pieces

    held = _load(bank, ids, first, total, row, stride, piece, pieces)
    tile = first
    while tile < total:
        # The next tile is asked for before this one, which may still be on its way, is stored.
        following = _load(bank, ids, tile + step, total, row, stride, piece, pieces)
        _store(words, places, held, tile, total, row, piece, pieces)
        held = following
        tile += step


@triton.jit
def _load(bank, ids, tile, total, row: tl.constexpr, stride: tl.constexpr, piece: tl.constexpr, pieces: tl.constexpr):
    """The tile [pieces, piece] that begins with this piece of the rows."""
    parts: tl.constexpr = (row + piece - 1) // piece
    each = tile + tl.arange(0, pieces)
    wanted = each < total
    rows = tl.load(ids + each // parts, mask=wanted, other=0).to(tl.int64)
    columns = (each % parts)[:, None] * piece + tl.arange(0, piece)[None, :]
    mask = wanted[:, None] if row % piece == 0 else wanted[:, None] & (columns < row)
    return tl.load(bank + rows[:, None] * stride + columns, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def _store(out, places, held, tile, total, row: tl.constexpr, piece: tl.constexpr, pieces: tl.constexpr):
    """The same tile to where it belongs."""
    parts: tl.constexpr = (row + piece - 1) // piece
    each = tile + tl.arange(0, pieces)
    columns = (each % parts)[:, None] * piece + tl.arange(0, piece)[None, :]
    mask = (each < total)[:, None] if row % piece == 0 else (each < total)[:, None] & (columns < row)
    rows = each // parts
    if places is not None:
        rows = tl.load(places + rows, mask=each < total, other=0)
    tl.store(out + rows.to(tl.int64)[:, None] * row + columns, held, mask=mask)
