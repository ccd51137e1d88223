"""Causal attention of Transformers' modules that learn and judge: over whole windows, without a mask.

Transformers asks in each pass whether a row is several packed sequences, which waits for the GPU, and whether its mask says no more
than that attention is causal. Under torch.compile and within a CUDA graph it cannot know, and makes a mask of all pairs: SDPA has no
fast kernel for it, and a compiled layer is compiled again. For attention that it does not know it makes no mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "rowcast_causal"


def without_masks(module: Any) -> None:
    """Let a module's tokens see all those before them, or what its layer's sliding window has of them, by `_causal`.

    Only for passes over whole windows, without a cache. Left as they are: models whose attention Transformers does not let be
    exchanged (Falcon, BLOOM, MPT).
    """
    from transformers import AttentionInterface

    if getattr(module, "_supports_attention_backend", False):
        AttentionInterface.register(NAME, _causal)
        module.config._attn_implementation = NAME


def _causal(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    # [B, H, T, d], [B, K, T, d] -> [B, T, H, d]
    count, share = query.shape[2], query.shape[1] // key.shape[1]
    assert key.shape[2] == count, "whole windows, without a cache"
    if sliding_window is None or count <= sliding_window:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=share > 1)
    else:
        places = torch.arange(count, device=query.device)
        back = places[:, None] - places
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        seen = (back >= 0) & (back < sliding_window)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None
