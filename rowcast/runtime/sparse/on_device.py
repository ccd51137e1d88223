"""The sparse view's passes in rounds that the device runs by itself: rows are chosen on the device, into buffers of a fixed capacity.

Sets are those that the host would choose (`selection`), where scores do not tie within rounding. Nothing is asked of the device, so
that a pass can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.gpu import lowbit, products, select
from rowcast.placement.workload import writes_late
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.kv.device import BoundStore
from rowcast.runtime.norm import Norm
from rowcast.runtime.protocols import ALL_HEADS, Heads, KVView, Reads
from rowcast.runtime.sparse.device_counts import DeviceCounts
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.lm_head import TOP, CertifiedHead
from rowcast.runtime.sparse.on_device_head import DeviceHead
from rowcast.runtime.sparse.on_device_heads import DeviceHeads, HeadsFound, top_mask
from rowcast.runtime.sparse.on_device_late import DeviceLate, kv_rows
from rowcast.runtime.sparse.scorers import FewBits, LowRank, Proxy
from rowcast.runtime.sparse.selection import Places, Selector
from rowcast.runtime.step import SeqStep

T = TypeVar("T")


class DevicePasses:
    """The sub-layers of a pass. What a selector reads ahead is found on a stream of its own: neurons while attention runs, heads while
    the MLP of the layer before does (Deja Vu, arXiv 2310.17157, section 4.3)."""

    def __init__(
        self,
        banks: BankWeights,
        neurons: Sequence[Selector | None],
        heads: Sequence[HeadSelector | None],
        sparse_tokens: int,
        outer_bytes: int,
        lm: CertifiedHead | None = None,
    ) -> None:
        """`outer_bytes`: read by a pass beside the layers' products. `lm`: the LM head; None: all its rows. Precondition: all selectors
        are `on_device`."""
        self._banks = banks
        self._outer_bytes = outer_bytes
        self.device = banks.ffn[0].up_down.device
        self._counts = counts = DeviceCounts(self.device, banks.spec.num_layers)
        self._head = None if lm is None else DeviceHead(banks, lm, counts)
        self._neurons = [
            None if selector is None else self._of_layer(layer, bank, selector, sparse_tokens)
            for layer, (bank, selector) in enumerate(zip(banks.ffn, neurons, strict=True))
        ]
        self._heads = [
            None if selector is None else DeviceHeads(banks, layer, selector, sparse_tokens, counts)
            for layer, selector in enumerate(heads)
        ]
        lazy = any(self._heads) and writes_late(banks.spec, 1, kv_rows(banks, 0)[0].nbytes)
        self._rings = DeviceLate(banks, counts) if lazy else None
        self._late: DeviceLate | None = None
        """In passes that may leave entries for later ones."""
        # First in line for multiprocessors: what follows attention waits for the choice.
        on_gpu = self.device.type == "cuda"
        self._side: Any = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self._ahead: tuple[Tensor, Choice] | None = None
        """Of the layer that runs, where its selector reads the attention's input: this, which the side stream still reads, and what it
        chooses."""
        self._heads_ahead: tuple[Tensor, HeadsFound] | None = None
        """Of the next layer, where its selector reads the MLP's input before: likewise."""

    def _of_layer(self, layer: int, bank: FfnBank, selector: Selector, sparse_tokens: int) -> DeviceNeurons:
        return DeviceNeurons(layer, bank, selector, sparse_tokens, self._counts)

    def begin_round(self, view: KVView, seq_ids: Sequence[int], late: bool, random: bool) -> None:
        """As `ChoosesOnDevice`."""
        if self._head is not None:
            self._head.best = TOP if random else 1
        if self._rings is not None:
            self._rings.begin_round(view, seq_ids, late)

    def host_pass(self, view: KVView, steps: Sequence[SeqStep]) -> None:
        """A pass that the host drives follows: it finds entries complete."""
        if self._rings is not None:
            self._rings.host_pass(view, steps)

    def begin(self, tokens: int, kv: object) -> None:
        """A pass over so many tokens starts."""
        self._counts.begin()
        self._late = self._rings if isinstance(kv, BoundStore) and kv.late is not None else None
        if self._late is not None:
            assert isinstance(kv, BoundStore)
            self._late.begin(kv)
        reads = self._counts.pass_reads
        reads.bytes = self._outer_bytes
        reads.heads_of = tokens * self._banks.split.heads * self._banks.spec.num_layers
        reads.neurons_of = tokens * sum(len(bank.order) for bank in self._banks.ffn)

    def send_reads(self) -> None:
        """As `ChoosesOnDevice`."""
        self._counts.send()

    def reads(self) -> Reads:
        """Of all passes up to the last `send_reads`, since those of the last call, replays included. Precondition: they are over."""
        return self._counts.read()

    def norm_of(self, layer: int, which: str) -> Norm:
        """As `WeightView`. Where a layer's heads are chosen ahead, the norm before its attention keeps what late K/V are made of."""
        norm, before = self._banks.norm_of(layer, which), self._banks.spec.pre_norm
        if self._late is None or which != ("attn" if before else "mlp"):
            return norm
        reader = layer if before else layer + 1
        heads = self._heads[reader] if reader < len(self._heads) else None
        return norm if heads is None or not heads.reads_ahead else replace(norm, keep=self._late.ring(reader))

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        neurons, heads, bank = self._neurons[layer], self._heads[layer], self._banks.attention[layer]
        found = None
        if heads is not None and heads.reads_ahead:
            assert self._heads_ahead is not None, f"nobody looked ahead for layer {layer}"
            self._join()
            (_, found), self._heads_ahead = self._heads_ahead, None
        ahead = neurons if neurons is not None and neurons.reads_ahead else None
        if ahead is not None and ahead.fetches:  # over the bus, which takes longest
            self._ahead = x, self._aside(partial(ahead.choose, x))
        if heads is not None:
            projected = heads.qkv(x, heads.choose(x, self._late) if found is None else found, self._late)
        else:
            reads = self._counts.pass_reads
            reads.use("heads", x.shape[0] * self._banks.split.heads, layer if any(self._heads) else None)
            reads.bytes += bank.qkv.nbytes + bank.o.nbytes
            projected = self._banks.qkv(layer, x)
        if ahead is not None and not ahead.fetches:  # behind the products, which keep the memory busy, beside attention
            self._ahead = x, self._aside(partial(ahead.choose, x))
        return projected

    def heads(self, layer: int) -> Heads:
        """What the layer's `qkv` computed."""
        heads = self._heads[layer]
        return ALL_HEADS if heads is None else heads.heads

    def out(self, layer: int, heads: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, C, d] -> [T, D]
        chosen = self._heads[layer]
        return self._banks.out(layer, heads, residual) if chosen is None else chosen.out(heads, residual)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        neurons, bank = self._neurons[layer], self._banks.ffn[layer]
        choice = self._seen_ahead() if neurons is not None and neurons.reads_ahead else None
        heads = self._heads[layer + 1] if layer + 1 < len(self._heads) else None
        if heads is not None and heads.reads_ahead:  # behind the join, which would wait for it
            self._heads_ahead = x, self._aside(partial(heads.choose, x, self._late))
        if neurons is None:
            count_rows(self._counts.pass_reads, bank, len(bank.order), len(bank.order))
            self._counts.pass_reads.use("neurons", x.shape[0] * len(bank.order), layer if any(self._neurons) else None)
            y = self._banks.mlp(layer, x, residual)
        else:
            y = neurons.mlp(x, neurons.choose(x) if choice is None else choice, residual)
        self._layer_is_done(layer)
        return y

    def _layer_is_done(self, layer: int) -> None:
        if layer == self._banks.spec.num_layers - 1 and self._head is None:
            self._counts.end()

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        """For some or all of the pass's tokens."""
        if self._head is None:
            return self._banks.head(x)
        logits = self._head.logits(x)
        self._counts.end()
        self._counts.begin()  # for others of the pass
        return logits

    def _aside(self, choose: Callable[[], T]) -> T:
        """What `choose` launches on the side stream, behind all that was launched so far."""
        if self._side is None:
            return choose()
        # Its tensors are the side stream's, which is always behind this one when it takes their memory again.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            return choose()

    def _join(self) -> None:
        """What is launched from here on comes behind all that the side stream does."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _seen_ahead(self) -> Choice:
        assert self._ahead is not None
        self._join()
        (_, choice), self._ahead = self._ahead, None
        return choice


Choice = select.Chosen | Tensor
"""The rows that are read, with each token's own among them; or all rows are, and this is which are each token's own, bool [T, N]."""


class DeviceNeurons:
    """One layer's MLP by its selector, as `SparseWeights.mlp` for generated tokens."""

    fetches = False
    """Whether `choose` begins to bring the rows from elsewhere."""

    def __init__(self, layer: int, bank: FfnBank, selector: Selector, sparse_tokens: int, counts: DeviceCounts) -> None:
        self._layer = layer
        self._bank = bank
        self._selector = selector
        self._sparse_tokens = min(sparse_tokens, gpu.MOST_TOKENS)
        self._counts = counts
        assert isinstance(selector.scorer, Proxy)
        self._proxy = selector.scorer
        self._norms = bank.norms if selector.norms is None else selector.norms
        self._kept: select.Places | None = None
        self._first: select.Places | None = None
        """Of the best scores of each shard: those that are kept, and those that are taken first."""
        if selector.top is not None:
            self._kept, self._first = map(_places, selector.top)

    @property
    def reads_ahead(self) -> bool:
        """Whether `choose` takes the attention's input, not the MLP's."""
        return self._proxy.reads == "ahead"

    def choose(self, x: Tensor) -> Choice:
        """x [T, D], the hidden state that the scorer reads."""
        tokens, scores, threshold = x.shape[0], proxy_scores(self._proxy, x), self._selector.threshold
        self._counts.pass_reads.bytes += self._proxy.bytes
        few = tokens <= self._sparse_tokens
        if threshold is None:
            assert self._first is not None
            self._counts.pass_reads.use("neurons", tokens * self._selector.keep, self._layer)
            return select.top_ids(scores, self._first) if few else top_mask(scores, self._first)
        if few and tokens == 1:
            found = select.above_ids(scores, threshold)
            self._counts.add_neurons(self._layer, found.count)
            return found
        own = scores > threshold
        self._counts.add_neurons(self._layer, own.sum())
        return select.above_ids(scores, threshold) if few else own

    def mlp(self, x: Tensor, choice: Choice, residual: Tensor | None) -> Tensor:
        """x [T, D] -> [T, D], plus a residual."""
        bank, reranks, neurons = self._bank, self._selector.reranks, len(self._bank.order)
        if isinstance(choice, Tensor):
            count_rows(self._counts.pass_reads, bank, neurons, neurons)
            hidden = bank.hidden(x)
            if reranks:
                assert self._kept is not None
                choice = top_mask(bank.score(hidden, norms=self._norms).masked_fill_(~choice, float("-inf")), self._kept)
            return bank.out(hidden * choice, residual=residual)
        ids, own = choice.ids, choice.own
        # A single token's best are as many as there are places.
        count = None if own is None and self._first is not None else choice.count
        if count is None:
            count_rows(self._counts.pass_reads, bank, len(ids), self._selector.keep)
        else:
            count_rows(self._counts.pass_reads, bank, 0, 0)
            self._counts.add("bytes", count, bank.in_row_bytes + bank.out_row_bytes)
        hidden = products.ffn_hidden(
            bank.gate, bank.up, bank.gate_bias, bank.up_bias, x, ids, count, bank.activation, None if reranks else own
        )
        if reranks:
            assert self._kept is not None
            if own is None:
                ids, _, hidden = select.rerank_one(hidden, choice, self._kept, self._norms)
            else:
                hidden = hidden * select.rerank(hidden, choice, self._kept, self._norms)
        return products.rows_out(bank.down, hidden, ids, count, bank.down_bias, residual)


def proxy_scores(proxy: Proxy, x: Tensor) -> Tensor:
    """`proxy`'s scores, [T, D] -> float32 [T, N], in as few launches as there are products."""
    if x.shape[0] > gpu.MOST_TOKENS:
        return proxy(x).values
    x = x if proxy.ahead is None else proxy.ahead(x)
    pre = proxy.pre
    if isinstance(pre, FewBits):
        return lowbit.scores(pre.weight, x, proxy.norms, proxy.activation, pre.bias, proxy.gated)
    assert isinstance(pre, LowRank)
    return lowbit.scores(pre.b, lowbit.product(pre.a, x), proxy.norms, proxy.activation, pre.bias, proxy.gated)


def count_rows(reads: Reads, bank: FfnBank, in_rows: int, out_rows: int) -> None:
    """Bytes of so many rows, and of the bias that every pass reads."""
    reads.bytes += in_rows * bank.in_row_bytes + out_rows * bank.out_row_bytes
    if bank.down_bias is not None:
        reads.bytes += bank.down_bias.nbytes


def _places(places: Places) -> select.Places:
    return select.Places(tuple(places.sizes), tuple(places.kept))
