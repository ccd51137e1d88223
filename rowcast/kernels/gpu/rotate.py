"""From the products of an attention's input to rotated queries, and to keys and values in their places of a store: one launch.

The fast path of clip and per-head norms (`runtime.weights.HeadSplit`), `runtime.rope.apply_rope` and a store's `append`. Each element
is computed in float32 and rounded where torch's own operations leave a tensor behind, but for the rotation, which rounds once.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rowcast.kernels.gpu.overlap import overlap

_TILE: Final = 1024
"""Elements that a program takes: whole heads of one token."""


def apart(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused products [N, (H + 2 K) d], q above k above v -> views q [N, H, d], k [N, K, d], v [N, K, d]."""
    split = qkv.unflatten(1, (heads + 2 * kv_heads, -1))
    return split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]


def rotate_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate N tokens' queries and keys, and write their keys and values where `slots` say. Returns q [N, H, d], in `out` if given.

    q [N, H, d], k, v [N, K, d] before RoPE, any strides but the last, which is 1 (`apart` gives such); keys, values
    [blocks, block_size, K, d] likewise; slots [N] int64: block * block_size + offset, -1: written nowhere. cos, sin [N, d] or
    [N, 1, d], the first half of sin negated, as `Rope.cos_sin` gives; without them nothing is rotated.

    Before that: all of them are clamped to [-clip, clip], then each head of q and k is divided by its root mean square and
    multiplied by q_norm or k_norm [d].
    """
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    assert k.shape == v.shape == (tokens, kv_heads, size) and keys.shape == values.shape and keys.shape[2:] == (kv_heads, size)
    assert slots.shape == (tokens,) and size % 2 == 0 and (q_norm is None) == (k_norm is None) and (cos is None) == (sin is None)
    assert all(t.stride(-1) == 1 for t in (q, k, v, keys, values))
    if cos is not None and sin is not None:
        cos, sin = cos.view(tokens, size), sin.view(tokens, size)
        assert cos.stride() == sin.stride() and cos.stride(1) == 1
    out = q.new_empty(q.shape) if out is None else out
    if tokens == 0:
        return out
    half = triton.next_power_of_2(size // 2)
    at_a_time = max(1, min(_TILE // (2 * half), triton.next_power_of_2(heads)))
    groups = triton.cdiv(heads, at_a_time) + 2 * triton.cdiv(kv_heads, at_a_time)
    _rotate_append[(groups, tokens)](
        q,
        k,
        v,
        keys,
        values,
        slots,
        cos,
        sin,
        q_norm,
        k_norm,
        out,
        eps,
        0.0 if clip is None else clip,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        0 if cos is None else cos.stride(0),
        out.stride(0),
        out.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        keys.shape[1],
        heads,
        kv_heads,
        size,
        half,
        at_a_time,
        clip is not None,
        num_warps=4,
        **overlap(q),
    )
    return out


@triton.jit
def _loaded(at, mask, clip, clipped: tl.constexpr):
    """float32, clamped as a tensor of the source's dtype."""
    x = tl.load(at, mask=mask, other=0.0)
    if clipped:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -clip), clip).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _rotate_append(
    q_ptr,  # [N, H, d]
    k_ptr,
    v_ptr,  # [N, K, d]
    keys_ptr,
    values_ptr,  # [blocks, block_size, K, d]
    slots_ptr,  # [N]
    cos_ptr,
    sin_ptr,  # [N, d]
    q_norm_ptr,
    k_norm_ptr,  # [d]
    out_ptr,  # [N, H, d]
    eps,
    clip,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    angle_token,
    out_token,
    out_head,
    keys_block,
    keys_entry,
    keys_head,
    values_block,
    values_entry,
    values_head,
    block_size,
    H: tl.constexpr,
    K: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    clipped: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """R heads of one token, all of q, of k or of v; their halves of d / 2 padded to D."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0)
    of_q: tl.constexpr = (H + R - 1) // R
    of_k: tl.constexpr = (K + R - 1) // R
    half: tl.constexpr = d // 2
    is_q, is_k = group < of_q, (group >= of_q) & (group < of_q + of_k)
    if not is_q:
        group = (group - of_q) % of_k
    head = group * R + tl.arange(0, R)
    dim = tl.arange(0, D)
    slot = tl.load(slots_ptr + token)
    block, inside = slot // block_size, slot % block_size
    if is_q:
        source = q_ptr + token * q_token + head[:, None] * q_head
        target = out_ptr + token * out_token + head[:, None] * out_head
    elif is_k:
        source = k_ptr + token * k_token + head[:, None] * k_head
        target = keys_ptr + block * keys_block + inside * keys_entry + head[:, None] * keys_head
    else:
        source = v_ptr + token * v_token + head[:, None] * v_head
        target = values_ptr + block * values_block + inside * values_entry + head[:, None] * values_head
    mask = (dim < half)[None, :] & (head < tl.where(is_q, H, K))[:, None]
    source += dim[None, :]
    target += dim[None, :]
    dtype = out_ptr.dtype.element_ty
    a = _loaded(source, mask, clip, clipped)
    b = _loaded(source + half, mask, clip, clipped)
    if is_q | is_k:
        if q_norm_ptr is not None:
            weight = q_norm_ptr if is_q else k_norm_ptr
            scale = 1 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / d + eps)
            weight_a = tl.load(weight + dim, mask=dim < half, other=0.0).to(tl.float32)
            weight_b = tl.load(weight + half + dim, mask=dim < half, other=0.0).to(tl.float32)
            a = (a * scale[:, None] * weight_a[None, :]).to(dtype).to(tl.float32)
            b = (b * scale[:, None] * weight_b[None, :]).to(dtype).to(tl.float32)
        if cos_ptr is not None:
            at = token * angle_token + dim
            cos_a = tl.load(cos_ptr + at, mask=dim < half, other=0.0).to(tl.float32)[None, :]
            cos_b = tl.load(cos_ptr + at + half, mask=dim < half, other=0.0).to(tl.float32)[None, :]
            sin_a = tl.load(sin_ptr + at, mask=dim < half, other=0.0).to(tl.float32)[None, :]
            sin_b = tl.load(sin_ptr + at + half, mask=dim < half, other=0.0).to(tl.float32)[None, :]
            a, b = a * cos_a + b * sin_a, b * cos_b + a * sin_b
    mask &= is_q | (slot >= 0)
    tl.store(target, a.to(dtype), mask=mask)
    tl.store(target + half, b.to(dtype), mask=mask)
