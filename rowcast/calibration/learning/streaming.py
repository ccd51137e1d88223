"""A Transformers model that sees what `runtime.kv.streaming.StreamingKV` shows: the first tokens and the recent ones.

There a token's sinks stand right before its recent entries: their keys, stored at their true positions, are turned up to that
place. Here all tokens of a window run at once, each with its own place, so it is the queries that are turned back, for the sinks
alone: q turned by -n and k differ in angle as q and k turned by n do. Both kinds of score come of one product: over [q, q turned back]
and, for each entry, [k, 0] or [0, k].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.errors import UserError
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import SINKS, STREAMING_STRIDE
from rowcast.runtime.rope import Rope, apply_rope
from rowcast.runtime.spec import ModelSpec

NAME = "rowcast_streaming"
QUERY_ROWS = 1024
"""Tokens whose scores are held at a time, of windows that are longer."""


@dataclass(frozen=True, slots=True)
class _Streaming:
    """How one attention layer sees."""

    budget: int
    sinks: int
    stride: int
    rope: Rope


def stream(module: Any, budget: int, sinks: int = SINKS, stride: int = STREAMING_STRIDE) -> None:
    """Let the module's attention see at most `budget` entries a token, `sinks` of them the first; evicted `stride` at a time.

    Only for passes over whole windows, without a cache. Raises UserError for a model that is none of the Llama kind (positions rotated,
    no windows of its own) and where the budget is too small.
    """
    from transformers import AttentionInterface

    spec = spec_from_config(module.config.to_dict())
    check_streams(spec, budget, sinks, stride)
    layers = [layer for layer in module.modules() if hasattr(layer, "layer_idx") and hasattr(layer, "scaling")]
    assert spec.rope is not None and len(layers) == spec.num_layers
    # The keys come with the attention factor applied.
    rope = Rope(replace(spec.rope, attention_factor=1.0), spec.head_dim, module.device)
    AttentionInterface.register(NAME, _attention)
    for layer in layers:
        layer.rowcast_streaming = _Streaming(budget, sinks, stride, rope)
    module.config._attn_implementation = NAME


def check_streams(spec: ModelSpec, budget: int, sinks: int = SINKS, stride: int = STREAMING_STRIDE) -> None:
    """Raise UserError for what `stream` does not do, before anything is trained."""
    own_code = spec.family == "falcon"  # whose attention Transformers does not let be exchanged
    if spec.rope is None or spec.rope.scaling == "dynamic" or any(spec.windows) or own_code:
        raise UserError(
            f"this {spec.family} model does not learn to stream: it needs rotated positions and no windows of its own"
        )
    if budget <= sinks + stride:
        raise UserError(f"--streaming {budget} is no more than {sinks} sinks and a stride of {stride}: raise it")


def starts(count: int, budget: int, sinks: int, stride: int, device: torch.device) -> Tensor:
    """Where the recent entries of the tokens 0 .. count - 1 start, [count] int64."""
    over = (torch.arange(count, device=device) + 1 - budget).clamp_min(0)
    return sinks + stride * ((over + stride - 1) // stride)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    # [B, H, T, d], [B, K, T, d] -> [B, T, H, d]
    seen_by: _Streaming = module.rowcast_streaming
    budget, sinks = seen_by.budget, seen_by.sinks
    count = query.shape[2]
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    if count <= budget:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None
    start = starts(count, budget, sinks, seen_by.stride, query.device)
    cos, sin = seen_by.rope.cos_sin(sinks - start, torch.zeros_like(start))
    queries = torch.cat((query, apply_rope(query, cos[:, 0].to(query.dtype), sin[:, 0].to(query.dtype))), -1)
    places = torch.arange(count, device=query.device)
    sink = (places < sinks)[:, None]
    keys = torch.cat((key.masked_fill(sink, 0), key.masked_fill(~sink, 0)), -1)
    parts = []
    for first in range(0, count, QUERY_ROWS):
        rows = slice(first, min(count, first + QUERY_ROWS))
        low = (sinks + max(0, first + 1 - budget)) // 8 * 8
        shown = torch.cat((places[:sinks], places[low : rows.stop])) if low > sinks else places[: rows.stop]
        mine = places[rows, None]
        seen = (shown <= mine) & ((shown < sinks) | (shown >= start[rows, None]))
        k, v = (keys, value) if len(shown) == count else (keys[:, :, shown], value[:, :, shown])
        parts.append(F.scaled_dot_product_attention(queries[:, :, rows], k, v, attn_mask=seen, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None
