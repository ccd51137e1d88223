"""Attention of one sequence's new tokens over keys and values: the torch reference.

Over all of them (`attend`) or over chosen ones (`attend_entries`): causal, with grouped-query heads, sliding windows and ALiBi.
Knows nothing of pages, layers or sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_ELEMENTS = 1 << 23
"""Most elements of one score mask; longer prefills go over their queries in blocks."""

FEW_TOKENS = 16
"""Up to so many tokens the query heads of a group are rows over one read of its keys; above, masks of all heads cost more."""

_ONE_THREAD_ELEMENTS = 1 << 18
"""Of K, up to which a CPU's attention of few tokens runs on one thread. Two are 1.3 times as fast at best where both cores are free;
where something else runs on one, each such call waits for the system's next turn: milliseconds for 30 us of work."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    slopes: Tensor | None = None,
    absolute_bias_scale: float | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the last T positions of a sequence of L.

    q [T, H, d]; k, v [L, K, d], K dividing H, L >= T: query i stands at position L - T + i and sees the keys up to and including
    it, the last `window` of them if given. Returns [T, H, d].

    `slopes` [H] adds ALiBi's slope * (key position - query position) to the scaled scores. With `absolute_bias_scale` the bias
    is Falcon's instead: slope * key position, rounded to bfloat16 as in its training, times that scale.

    `heads` [C] int64: only these query heads are wanted; returns [T, C, d].
    """
    if heads is not None:
        q, k, v, slopes, wanted = _chosen(q, k, v, slopes, heads, dim=1)
        out = attend(q, k, v, scale=scale, window=window, slopes=slopes, absolute_bias_scale=absolute_bias_scale)
        return out if wanted is None else out.index_select(1, wanted)
    tokens, length = q.shape[0], k.shape[0]
    first = length - tokens
    rows = max(1, MASK_ELEMENTS // (length * (1 if slopes is None else q.shape[1])))
    plain_causal = slopes is None and window is None and first == 0
    if tokens > rows and not plain_causal:
        parts = [
            attend(
                q[i : i + rows],
                k[: first + min(i + rows, tokens)],
                v[: first + min(i + rows, tokens)],
                scale=scale,
                window=window,
                slopes=slopes,
                absolute_bias_scale=absolute_bias_scale,
            )
            for i in range(0, tokens, rows)
        ]
        return torch.cat(parts)
    low = 0 if window is None else max(0, first + 1 - window)  # the oldest key that any query sees
    k, v = k[low:], v[low:]
    if tokens == 1 and slopes is None:
        return _few_tokens(q, k.transpose(0, 1), v.transpose(0, 1), scale, None)
    mask, causal = _mask(q, low, length, window, slopes, absolute_bias_scale)
    if tokens <= FEW_TOKENS and not causal:
        return _few_tokens(q, k.transpose(0, 1), v.transpose(0, 1), scale, mask)
    return _many_tokens(q, k, v, scale, mask, causal)


def attend_entries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    absolute_bias_scale: float | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """Softmax attention of T tokens over chosen entries, other ones for each KV head.

    q [T, H, d]; k, v [K, n, d], K dividing H, n >= T: the last T entries are the tokens' own, causal among them; the others are
    seen by all, in any order. Returns [T, H, d].

    With `window` or `slopes` (as in `attend`) true positions count: `key_positions` [K, n] and `query_positions` [T] (int64).
    `heads` as in `attend`.
    """
    if heads is not None:
        groups = k.shape[0]
        q, k, v, slopes, wanted = _chosen(q, k, v, slopes, heads, dim=0)
        if key_positions is not None and k.shape[0] < groups:
            key_positions = key_positions.index_select(0, heads)
        out = attend_entries(
            q,
            k,
            v,
            scale=scale,
            key_positions=key_positions,
            query_positions=query_positions,
            window=window,
            slopes=slopes,
            absolute_bias_scale=absolute_bias_scale,
        )
        return out if wanted is None else out.index_select(1, wanted)
    tokens, length = q.shape[0], k.shape[1]
    if tokens == 1 and window is None and slopes is None:
        return _few_tokens(q, k, v, scale, None)
    entries = torch.arange(length, device=q.device)
    seen = entries <= entries[length - tokens :, None]  # [T, n]
    if window is None and slopes is None:
        return _few_tokens(q, k, v, scale, seen)
    assert key_positions is not None and query_positions is not None, "windows and slopes need positions"
    share = q.shape[1] // k.shape[0]
    keys, queries = key_positions.repeat_interleave(share, 0)[:, None], query_positions[:, None]  # [H, 1, n], [T, 1]
    seen = seen & (keys > queries - window) if window is not None else seen.expand(q.shape[1], tokens, length)
    if slopes is None:
        return _few_tokens(q, k, v, scale, seen)
    bias = _alibi(slopes, keys, queries, absolute_bias_scale)
    return _few_tokens(q, k, v, scale, torch.where(seen, bias, float("-inf")).to(q.dtype))


def attend_seen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float,
    key_positions: Tensor,
    query_positions: Tensor,
    window: int | None = None,
    slopes: Tensor | None = None,
    absolute_bias_scale: float | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """Softmax attention of T tokens over the entries that each of them sees.

    q [T, H, d]; k, v [L, K, d], K dividing H; seen [T, L] bool. Returns [T, H, d]. True positions, `key_positions` [L] and
    `query_positions` [T] (int64), count for `window` and `slopes`, which are as in `attend`, as are `heads`.
    """
    if heads is not None:
        q, k, v, slopes, wanted = _chosen(q, k, v, slopes, heads, dim=1)
    queries = query_positions[:, None]
    mask = seen if window is None else seen & (key_positions > queries - window)
    if slopes is not None:
        bias = _alibi(slopes, key_positions, queries, absolute_bias_scale)
        mask = torch.where(mask, bias, float("-inf")).to(q.dtype)
    out = _many_tokens(q, k, v, scale, mask, False)
    return out if heads is None or wanted is None else out.index_select(1, wanted)


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, heads: Tensor, *, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What attention of the chosen query heads reads, and which of its outputs are wanted (None: all).

    K and V of the other heads are left out where each query head has its own; `dim`: that of KV heads in k and v. A group's heads
    read the same ones, so all groups run.
    """
    if k.shape[dim] != q.shape[1]:
        return q, k, v, slopes, heads
    slopes = None if slopes is None else slopes.index_select(0, heads)
    return q.index_select(1, heads), k.index_select(dim, heads), v.index_select(dim, heads), slopes, None


def _few_tokens(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """The query heads of a group read the same keys: they are rows of one product, so K and V are read once."""
    # q [T, H, d], k, v [K, L, d], mask [T, L] or [H, T, L] -> [T, H, d]
    tokens, heads, size = q.shape
    groups, length = k.shape[:2]
    share = heads // groups
    queries = q.view(tokens, groups, share, size).permute(1, 2, 0, 3).reshape(1, groups, share * tokens, size)
    if mask is not None:
        mask = mask.expand(share, tokens, length) if mask.dim() == 2 else mask
        mask = mask.reshape(1, -1, share * tokens, length)
    threads = torch.get_num_threads()
    alone = threads > 1 and k.device.type == "cpu" and k.numel() <= _ONE_THREAD_ELEMENTS
    if alone:
        torch.set_num_threads(1)
    try:
        out = F.scaled_dot_product_attention(queries, k[None], v[None], attn_mask=mask, scale=scale)
    finally:
        if alone:
            torch.set_num_threads(threads)
    return out.view(groups, share, tokens, size).permute(2, 0, 1, 3).reshape(tokens, heads, size)


def _many_tokens(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    # q [T, H, d], k, v [L, K, d], mask [T, L] or [H, T, L] -> [T, H, d]
    tokens, heads, size = q.shape
    length, groups = k.shape[:2]
    share = heads // groups
    queries = q.view(tokens, groups, share, size).permute(1, 2, 0, 3)  # [K, H/K, T, d]
    keys = k.transpose(0, 1)[:, None].expand(groups, share, length, size)  # a stride of 0: no copy
    values = v.transpose(0, 1)[:, None].expand(groups, share, length, size)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(groups, share, tokens, length)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, size)


def _mask(
    q: Tensor, low: int, length: int, window: int | None, slopes: Tensor | None, absolute_bias_scale: float | None
) -> tuple[Tensor | None, bool]:
    """(mask, is_causal): [T, L] bool (True = seen), or [H, T, L] additive where there are slopes."""
    tokens = q.shape[0]
    keys = torch.arange(low, length, device=q.device)
    queries = torch.arange(length - tokens, length, device=q.device)[:, None]
    if slopes is None and window is None and tokens == length:
        return None, True
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    if slopes is None:
        return seen, False
    bias = _alibi(slopes, keys, queries, absolute_bias_scale)
    return torch.where(seen, bias, float("-inf")).to(q.dtype), False


def _alibi(slopes: Tensor, keys: Tensor, queries: Tensor, absolute_scale: float | None) -> Tensor:
    # slopes [H], positions: keys [L] or [H, 1, L], queries [T, 1] -> [H, T, L], or [H, 1, L] where the bias is absolute
    if absolute_scale is None:
        return slopes.float()[:, None, None] * (keys - queries)
    return (slopes.bfloat16()[:, None, None] * keys.bfloat16()).float() * absolute_scale
