"""The attention side of the sparse weight view: query heads by choice, and K/V of skipped heads when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rowcast.runtime.banks import BankWeights, product
from rowcast.runtime.protocols import ALL_HEADS, Heads, KVView, Late, Reads, Tokens
from rowcast.runtime.sparse.heads import HeadChoice, HeadOracle, HeadSelector
from rowcast.runtime.sparse.lazy import LazyKV

HeadObserver = Callable[[int, Tensor, Tensor], None]
"""Called by passes that compute all heads, with the layer, outputs [T, H, d] and the tokens' heads [T, H] bool (prompts': all)."""


class SparseAttention:
    """Products of chosen heads. Where each query head has a KV head of its own, K/V are lazy (`LazyKV`); grouped heads share small
    ones, which are always computed.

    In 16 bits, passes over one token and over many round hidden states differently, so that a choice between nearly equal scores may
    fall differently, too."""

    def __init__(self, banks: BankWeights, selectors: Sequence[HeadSelector | HeadOracle | None], *, late: bool = True) -> None:
        """`selectors`: by layer; None: all heads. `late`: where K/V can be lazy, they are."""
        self._banks = banks
        self._selectors = list(selectors)
        self._chooses = any(selector is not None for selector in selectors)
        self._skips = late and banks.spec.group_size == 1 and any(isinstance(selector, HeadSelector) for selector in selectors)
        self._views: WeakKeyDictionary[KVView, LazyKV] = WeakKeyDictionary()
        self._lazy: LazyKV | None = None
        """Of the view that the pass runs over; None where K/V of no head are skipped."""
        self._reads = Reads()
        self._few = False
        self._generated: Tensor | None = None
        """Of a pass with prompt tokens: which tokens are none, [T, 1] bool. None: all are generated."""
        self._count = 0
        """Generated tokens."""
        self._ahead: HeadChoice | None = None
        """Of the next layer, where its selector reads the MLP's input before."""
        self._choice: HeadChoice | None = None
        """Of the layer that runs; None: all heads."""
        self._heads = ALL_HEADS
        self.observer: HeadObserver | None = None

    def begin(self, tokens: Tokens, kv: KVView, few: bool, reads: Reads) -> None:
        """A pass over these tokens, bound to `kv`, starts; it counts in `reads`. `few`: it reads chosen rows only."""
        generated = tokens.generated
        self._reads, self._few, self._count = reads, few, sum(generated)
        mixed = self._count < len(generated)
        self._generated = torch.tensor(generated, device=tokens.ids.device)[:, None] if mixed else None
        if self._skips:
            self._lazy = self._views.setdefault(kv, LazyKV(self._banks.spec.num_layers, self._banks.split.kv_heads))
            self._lazy.begin(tokens.steps, kv, few)

    def look_ahead(self, layer: int, x: Tensor) -> None:
        """x [T, D], the MLP's input of the layer before `layer`: what a selector that reads ahead chooses by."""
        selector = self._selectors[layer] if layer < len(self._selectors) else None
        if isinstance(selector, HeadSelector) and selector.reads == "ahead" and self._count:
            self._ahead = selector(x, self._few)

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> q [T, H, d], k [T, K, d], v [T, K, d]; heads that are not computed are 0."""
        bank, split = self._banks.attention[layer], self._banks.split
        self._choice = self._choose(layer, x)
        ids = None if self._choice is None else self._choice.ids
        rows = None if ids is None else self._rows(ids)
        q = _among(split.queries(layer, product(bank.q, x, bank.q_bias, rows)), ids, split.heads)
        self._read(bank.q, rows)
        late, lacking, kv_ids, kv_rows = None, None, None, None
        if self._lazy is not None:
            kv_ids, kv_rows = (None, None) if self._lazy.complete else (ids, rows)
            lacking = self._lazy.exchange(layer, x, kv_ids)
            x = x if lacking is None else torch.cat((lacking.inputs, x))
        k = split.keys(layer, product(bank.k, x, bank.k_bias, kv_rows))
        v = split.values(product(bank.v, x, bank.v_bias, kv_rows))
        self._read(bank.k, kv_rows)
        self._read(bank.v, kv_rows)
        if lacking is not None:
            before = len(lacking.positions)
            late = Late(kv_ids, lacking.spans, lacking.positions, lacking.prompt_lengths, k[:before], v[:before])
            k, v = k[before:], v[before:]
        self._heads = Heads(ids, late)
        return q, _among(k, kv_ids, split.kv_heads), _among(v, kv_ids, split.kv_heads)

    def heads(self, layer: int) -> Heads:
        """What the layer's `qkv` computed."""
        return self._heads

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of the chosen heads, each token by its own: [T, C, d] -> [T, D]."""
        bank, selector, choice, count = self._banks.attention[layer], self._selectors[layer], self._choice, self._count
        if self._lazy is not None:
            self._lazy.written()
        tokens, computed = heads.shape[:2]
        own = None if choice is None else choice.own
        if isinstance(selector, HeadOracle) and count:
            own = selector(heads, bank.o)
        if own is not None and self._generated is not None:
            own = own | ~self._generated
        self._reads.heads_of += count * self._banks.split.heads
        used = count * computed if own is None else int(own.sum()) - (tokens - count) * computed
        self._reads.use("heads", used, layer if self._chooses else None)
        if own is not None:
            if self.observer is not None and computed == self._banks.split.heads:
                self.observer(layer, heads, own)
            heads = heads * own[:, :, None]
        rows = None if choice is None or choice.ids is None else self._rows(choice.ids)
        self._read(bank.o, rows)
        return bank.out(heads.flatten(1), rows, residual)

    def _choose(self, layer: int, x: Tensor) -> HeadChoice | None:
        selector = self._selectors[layer]
        if not isinstance(selector, HeadSelector) or not self._count:
            return None
        self._reads.bytes += selector.bytes
        if selector.reads == "own":
            return selector(x, self._few)
        chosen, self._ahead = self._ahead, None
        assert chosen is not None, f"nobody looked ahead for layer {layer}"
        return chosen

    def _rows(self, ids: Tensor) -> Tensor:
        # heads [C] -> rows [C d] of a head-major table
        size = self._banks.spec.head_dim
        return (ids[:, None] * size + torch.arange(size, device=ids.device)).flatten()

    def _read(self, table: Tensor, rows: Tensor | None) -> None:
        self._reads.bytes += table.nbytes if rows is None else table[0].nbytes * len(rows)


def _among(heads: Tensor, ids: Tensor | None, count: int) -> Tensor:
    """[T, C, d] of the heads `ids` (None: all) -> [T, count, d], the others 0."""
    if ids is None:
        return heads
    return heads.new_zeros(heads.shape[0], count, heads.shape[2]).index_copy_(1, ids, heads)
