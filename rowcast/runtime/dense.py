"""What plain decoding would have read, to compare with what a ladder did. Torch-free."""

from __future__ import annotations

from collections import Counter

from rowcast.placement.plan import DTYPE_BYTES, Plan
from rowcast.placement.resident import pass_bytes, rank_share
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token


class DenseReads:
    """Bytes of weights and KV that a rank reads, as `RequestStats.bytes_read` counts them."""

    def __init__(self, plan: Plan, spec: ModelSpec) -> None:
        share, width = rank_share(spec, plan.world), DTYPE_BYTES[plan.dtype]
        self.weight_bytes = pass_bytes(share, width)
        """Read by a pass over all weights, whatever the number of tokens in it."""
        self._layer_bytes = kv_bytes_per_token(share, width) // share.num_layers
        """Of a token's K/V in one layer."""
        self._windows = Counter(spec.windows or (None,) * spec.num_layers)
        """Layers by window."""

    def bytes(self, entries: int, tokens: int, sequences: int) -> int:
        """For one of so many `sequences` in a step: of plain decoding that gives it `tokens` >= 1 tokens, one a pass, the first pass
        with `entries` tokens in its context, new ones included. A part of a prefill is one pass."""
        weights = tokens * self.weight_bytes // sequences
        return weights + sum(self._kv_bytes(entries + later) for later in range(tokens))

    def _kv_bytes(self, entries: int) -> int:
        return self._layer_bytes * sum(layers * min(entries, window or entries) for window, layers in self._windows.items())
