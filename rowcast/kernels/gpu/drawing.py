"""The draw of a sampling step: temperature, min_p, Gumbel noise and argmax in one pass over the logits.

It draws what `Sampler.process` and `Sampler.draw` draw (runtime/sampler.py) for requests that set temperature and min_p alone: the
noise is Philox4x32-10 of (seed, sample index, position, purpose, token id) as in runtime/philox.py, in float64, so that a draw knows
neither the batch nor the shard. All parameters are tensors of the device: requests with different ones share a captured graph.

Each program draws from one block of a row's vocabulary; the last of a row's programs to arrive combines them. The maximum does not
depend on an order, so blocks may depend on the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rowcast.kernels.gpu.scratch import counters

MOST_ROWS = 1024
"""Of a call."""
_MAXIMA_BLOCK = 4096

_NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _noise(words):  # uint32 -> float64
    return -tl.log(-tl.log((words.to(tl.float64) + 0.5) * 2.0**-32))


@triton.jit
def _rough_log(x, ASM: tl.constexpr):
    """Within 2^-22 of log2's value, or of 1 where that is more. ASM: not in the interpreter."""
    if ASM:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        log2 = tl.log2(x)
    return log2 * 0.6931471805599453


@triton.jit
def _rough_noise(words, ASM: tl.constexpr):  # uint32 -> float32, within 3e-5
    far = ((0xFFFFFFFF - words).to(tl.float32) + 0.5) * 2.0**-32  # 1 - u, to full precision where u is near 1
    series = far * (1 + far * (1 / 2 + far * (1 / 3 + far * (1 / 4 + far * (1 / 5 + far * (1 / 6))))))
    near = -_rough_log((words.to(tl.float32) + 0.5) * 2.0**-32, ASM)
    return -_rough_log(tl.where(far < 0.0625, series, near), ASM)


@triton.jit
def _words(groups, position, stream, sample, seed):
    return tl.philox_impl(groups, position, stream, sample, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def _best(score, tokens, mask):
    """The largest score and the lowest token that has it."""
    known = tl.where(mask, score, float("-inf"))
    value = tl.max(known, 0)
    return value, tl.min(tl.where(mask & (known == value), tokens, _NONE), 0)


@triton.jit
def _random(
    x,
    heat,
    floor,
    tokens,
    mask,
    first,
    position,
    stream,
    sample,
    seed,
    BLOCK: tl.constexpr,
    MIN_P: tl.constexpr,
    ROUGH: tl.constexpr,
    ASM: tl.constexpr,
):
    """The best of a block's noisy logits: x [BLOCK] float32 of the tokens from `first` on, a multiple of 4."""
    groups = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = _words(groups, position, stream, sample, seed)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    settled = False
    value = tl.full([], float("-inf"), tl.float64)
    token = tl.full([], _NONE, tl.int32)
    if ROUGH:
        # float64 is slow, and float32 knows all but near ties. The margin is twice the error of noise, quotient and sum.
        law = _law(x, heat, floor, MIN_P) if MIN_P else x * (1 / heat)
        rough = tl.where(mask & (x == x), _rough_noise(words, ASM) + law, float("-inf"))
        top = tl.max(rough, 0)
        near = rough >= top - (1e-4 + 1e-6 * tl.abs(top))  # none where the top is infinite
        candidate = tl.min(tl.where(near, tokens, _NONE), 0)
        if tl.sum(near.to(tl.int32), 0) == 1:
            settled = True
            token = candidate
            v0, v1, v2, v3 = _words((token // 4).to(tl.uint32), position, stream, sample, seed)
            rest = token % 4
            word = tl.where(rest == 0, v0, tl.where(rest == 1, v1, tl.where(rest == 2, v2, v3)))
            logit = tl.sum(tl.where(tokens == token, x, 0.0), 0)
            value = _noise(word) + tl.div_rn(logit, heat).to(tl.float64)
        elif (top == float("-inf")) & MIN_P:  # all is cut
            settled = True
            token = tl.min(tl.where(mask, tokens, _NONE), 0)
    if not settled:
        value, token = _best(_noise(words) + _law(x, heat, floor, MIN_P).to(tl.float64), tokens, mask)
    return value, token


@triton.jit
def _law(x, heat, floor, MIN_P: tl.constexpr):
    law = tl.div_rn(x, heat)
    return tl.where(law < floor, float("-inf"), law) if MIN_P else law


@triton.jit
def _maxima_kernel(
    logits, stride, temperature, log_min_p, rows, maxima, vocabulary, group, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest logit of each block of the rows that a minimum probability cuts."""
    block, row = tl.program_id(0), tl.program_id(1)
    place = maxima + row * tl.num_programs(0) + block
    asked = (tl.load(log_min_p + row // group) > float("-inf")) & (tl.load(temperature + row // group) > 0)
    if MASKED:
        asked = asked & (tl.load(rows + row) != 0)
    if asked:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=columns < vocabulary, other=float("-inf"))
        tl.store(place, tl.max(x.to(tl.float32), 0))


@triton.jit(do_not_specialize=["stream"])
def _draw_kernel(
    logits,
    stride,
    temperature,
    log_min_p,
    maxima,
    maxima_count,
    seeds,
    sample_index,
    positions,
    rows,
    values,
    ids,
    partial_values,
    partial_ids,
    arrivals,
    vocabulary,
    first_token,
    stream,
    group,
    offset,
    MIN_P: tl.constexpr,
    MASKED: tl.constexpr,
    ROUGH: tl.constexpr,
    BLOCK: tl.constexpr,
    MAXIMA: tl.constexpr,
    PARTIALS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (block, row). MAXIMA and PARTIALS: powers of two that hold the row's maxima and blocks."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    if MASKED:  # noqa: SIM102 - without a mask there is nothing to load
        if tl.load(rows + row) == 0:
            tl.store(ids + row, 0, mask=block == 0)
            tl.store(values + row, float("-inf"), mask=block == 0)
            return
    entry = row // group
    heat = tl.load(temperature + entry)
    first = first_token // 4 * 4 + block * BLOCK
    tokens = first + tl.arange(0, BLOCK)
    columns = tokens - first_token
    mask = (columns >= 0) & (columns < vocabulary)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, mask=mask, other=float("-inf")).to(tl.float32)
    unsound = tl.max((x != x).to(tl.int32), 0)
    if heat > 0:
        floor = float("-inf")
        if MIN_P:
            span = tl.arange(0, MAXIMA)
            highest = tl.max(tl.load(maxima + row * maxima_count + span, mask=span < maxima_count, other=float("-inf")), 0)
            cut = tl.load(log_min_p + entry)
            # Where nothing is cut the maxima were not taken.
            floor = tl.where(cut > float("-inf"), tl.div_rn(highest, heat) + cut, float("-inf"))
        position = (tl.load(positions + row) + offset).to(tl.uint32)
        sample = tl.load(sample_index + entry).to(tl.uint32)
        seed = tl.load(seeds + entry)
        value, token = _random(
            x, heat, floor, tokens, mask, first, position, stream.to(tl.uint32), sample, seed, BLOCK, MIN_P, ROUGH, ASM
        )
    else:
        rough, token = _best(x, tokens, mask)
        value = rough.to(tl.float64)
    value = tl.where(unsound != 0, float("nan"), value)
    tl.store(partial_values + row * blocks + block, value)
    tl.store(partial_ids + row * blocks + block, token)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == blocks - 1:
        tl.store(arrivals + row, 0)
        span = tl.arange(0, PARTIALS)
        found = tl.load(partial_values + row * blocks + span, mask=span < blocks, other=float("-inf"), cache_modifier=".cg")
        tokens_found = tl.load(partial_ids + row * blocks + span, mask=span < blocks, other=_NONE, cache_modifier=".cg")
        lost = tl.max((found != found).to(tl.int32), 0)
        value, token = _best(found, tokens_found, span < blocks)
        tl.store(values + row, tl.where(lost != 0, float("nan"), value))
        tl.store(ids + row, tl.where(lost != 0, -1, token).to(tl.int64))


def draw(
    logits: Tensor,
    temperature: Tensor,
    log_min_p: Tensor | None,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
    *,
    purpose: int = 0,
    rung: int = 0,
    round_index: int = 0,
    rows: Tensor | None = None,
    group: int = 1,
    offset: int = 0,
) -> Tensor:
    """Each row's next token: logits [N, V] of float32, bfloat16 or float16 -> ids [N] int64.

    temperature float32 (0: greedy, the argmax of the raw logits), log_min_p float32 (-inf: off; None: off for all), seeds and
    sample_index int64 are [N / group]: consecutive `group` rows are of one sequence. positions [N], int64 or int32, plus `offset` are
    those of the tokens drawn. rows [N] int32: 0 leaves a row out, whose id is 0.

    The lowest id wins a tie; -1 where the row has NaN. Does not modify its arguments and asks the device nothing. One launch, two with
    log_min_p. The first call must not be captured (`scratch.py`).
    """
    return draw_best(
        logits,
        temperature,
        log_min_p,
        seeds,
        sample_index,
        positions,
        purpose=purpose,
        rung=rung,
        round_index=round_index,
        rows=rows,
        group=group,
        offset=offset,
    )[1].view(torch.int64)


def draw_best(
    logits: Tensor,
    temperature: Tensor,
    log_min_p: Tensor | None,
    seeds: Tensor,
    sample_index: Tensor,
    positions: Tensor,
    *,
    first_token: int = 0,
    highest: Tensor | None = None,
    purpose: int = 0,
    rung: int = 0,
    round_index: int = 0,
    rows: Tensor | None = None,
    group: int = 1,
    offset: int = 0,
    rough: bool = True,
) -> Tensor:
    """What a shard of the vocabulary draws, the tokens from `first_token` on: float64 [2, N], values and below them the bits of the
    ids, int64, as `winners` takes them from every shard.

    The shard with the largest value has drawn the token, and of equal ones the first; a value of NaN means that the row has NaN. A
    row that is left out has value -inf. `highest` [N] float32: each row's largest logit over all shards, which log_min_p needs if
    this is not all of the vocabulary. Otherwise as `draw`. `rough`: whether float32 sifts first, which is faster; same result.
    """
    many, vocabulary = logits.shape
    entries = many // group
    assert 0 < many <= MOST_ROWS and many % group == 0 and logits.stride(1) == 1
    assert temperature.shape == seeds.shape == sample_index.shape == (entries,) and positions.shape == (many,)
    assert temperature.dtype == torch.float32 and seeds.dtype == sample_index.dtype == torch.int64
    assert log_min_p is None or (log_min_p.shape == (entries,) and log_min_p.dtype == torch.float32)
    assert rows is None or (rows.shape == (many,) and rows.dtype == torch.int32)
    assert all(t is None or t.is_contiguous() for t in (temperature, seeds, sample_index, positions, log_min_p, rows, highest))
    assert 0 <= purpose < 1 << 8 and 0 <= rung < 1 << 8 and 0 <= round_index < 1 << 16
    device = logits.device
    maxima, maxima_count = highest, 1
    if log_min_p is not None and highest is None:
        maxima_count = triton.cdiv(vocabulary, _MAXIMA_BLOCK)
        maxima = torch.empty(many * maxima_count, dtype=torch.float32, device=device)
        _maxima_kernel[(maxima_count, many)](
            logits,
            logits.stride(0),
            temperature,
            log_min_p,
            rows,
            maxima,
            vocabulary,
            group,
            MASKED=rows is not None,
            BLOCK=_MAXIMA_BLOCK,
            num_warps=8,
        )
    skipped = first_token % 4
    block = _block(many, skipped + vocabulary)
    blocks = triton.cdiv(skipped + vocabulary, block)
    # Values and ids side by side, as `winners` takes them from every rank.
    best = torch.empty(2, many, dtype=torch.float64, device=device)
    partial_values = torch.empty(many * blocks, dtype=torch.float64, device=device)
    partial_ids = torch.empty(many * blocks, dtype=torch.int32, device=device)
    _draw_kernel[(blocks, many)](
        logits,
        logits.stride(0),
        temperature,
        log_min_p,
        maxima,
        maxima_count,
        seeds,
        sample_index,
        positions,
        rows,
        best[0],
        best[1].view(torch.int64),
        partial_values,
        partial_ids,
        counters(device, many),
        vocabulary,
        first_token,
        purpose | rung << 8 | round_index << 16,
        group,
        offset,
        MIN_P=log_min_p is not None,
        MASKED=rows is not None,
        ROUGH=rough,
        BLOCK=block,
        MAXIMA=triton.next_power_of_2(maxima_count),
        PARTIALS=triton.next_power_of_2(blocks),
        ASM=logits.is_cuda,
        num_warps=4,
    )
    return best


def winners(pairs: Tensor) -> Tensor:
    """The ids that several shards' draws come to, shards in the order of their tokens: `draw_best` of each, float64 [W, 2, N] ->
    int64 [N]. One launch."""
    shards, two, rows = pairs.shape
    assert two == 2 and pairs.dtype == torch.float64 and pairs.is_contiguous()
    ids = torch.empty(rows, dtype=torch.int64, device=pairs.device)
    _winners_kernel[(rows,)](pairs, pairs.view(torch.int64), ids, shards, SHARDS=triton.next_power_of_2(shards), num_warps=1)
    return ids


@triton.jit
def _winners_kernel(values, tokens, ids, shards, SHARDS: tl.constexpr):
    """Program: row."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    shard = tl.arange(0, SHARDS)
    there, place = shard < shards, shard * 2 * rows + row
    value = tl.load(values + place, mask=there, other=float("-inf"))
    _, token = _best(value, tl.load(tokens + place + rows, mask=there, other=0).to(tl.int32), there)
    tl.store(ids + row, tl.where(tl.max((value != value).to(tl.int32), 0) != 0, -1, token).to(tl.int64))


def _block(rows: int, vocabulary: int) -> int:
    """Tokens of a program, as measured on an H100."""
    return 1024 if rows * vocabulary < 1 << 20 else 2048
