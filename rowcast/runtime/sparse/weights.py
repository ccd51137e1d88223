"""The sparse weight view: reads the neurons, heads and vocabulary rows that a token needs, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rowcast.kernels import gpu, lowbit
from rowcast.kernels.rows import library_for_tables
from rowcast.runtime.banks import FEW_TOKENS, AttentionBank, BankWeights, FfnBank, product
from rowcast.runtime.protocols import KVView, Reads, Tokens
from rowcast.runtime.sparse.attention import HeadObserver, SparseAttention
from rowcast.runtime.sparse.heads import HeadOracle, HeadSelector
from rowcast.runtime.sparse.lm_head import CertifiedHead
from rowcast.runtime.sparse.scorers import Scored
from rowcast.runtime.sparse.selection import Selection, Selector
from rowcast.runtime.weights import plus

if TYPE_CHECKING:
    from rowcast.runtime.sparse.on_device import DevicePasses

SPARSE_TOKENS = 8
"""Up to so many tokens the union of their rows is read; above, all rows are, and each token still uses its own set."""

Observer = Callable[[int, Selector, Tensor, Tensor], None]
"""Called by passes that read all rows, with the layer, its selector, activations [T, N] and the tokens' sets [T, N] (prompts': all)."""


class SparseWeights:
    """Chosen rows of a model in the bank layout. Implements `WeightView`.

    What a token's output is depends on the token alone: its own set. Unions over tokens and many tokens decide only what is read.
    Prompt tokens use all rows. Rounds that the device runs by itself choose there (`on_device`).
    """

    def __init__(
        self,
        banks: BankWeights,
        neurons: Sequence[Selector | None],
        *,
        heads: Sequence[HeadSelector | HeadOracle | None] | None = None,
        lm: CertifiedHead | None = None,
        sparse_tokens: int = SPARSE_TOKENS,
    ) -> None:
        """`neurons`, `heads`: for each layer its selector, or None: all of them. `lm`: the LM head; None: all its rows."""
        self.spec = banks.spec
        self._banks = banks
        self._neurons = list(neurons)
        self._one_call = [s is not None and s.in_one_call is not None for s in neurons]
        self._chooses = any(s is not None for s in neurons)
        """Whether any layer leaves neurons out."""
        self._heads = list(heads or [None] * banks.spec.num_layers)
        chosen = [*neurons, *self._heads]
        self.on_device = all(s is None or (not isinstance(s, HeadOracle) and s.on_device) for s in chosen)
        """Whether a GPU chooses, in rounds that it runs by itself. It leaves no K/V for later passes, nor do those before."""
        late = not (self.on_device and gpu.serves(banks.ffn[0].up_down.device))
        self._attention = SparseAttention(banks, self._heads, late=late)
        self._sparse_tokens = sparse_tokens
        self._reads = Reads()
        self._generated: list[bool] = []
        self._ahead: Selection | None = None
        """Of the layer that runs, where its selector reads the attention's input."""
        self._observer: Observer | None = None
        self._lm = lm
        self._outer_bytes = banks.outer_bytes + sum(_whole_bytes(bank) for bank in banks.attention)
        if banks.spec.qk_norm == "head":
            self._outer_bytes += 2 * banks.spec.num_layers * banks.spec.head_dim * banks.ffn[0].up_down.itemsize
        if lm is not None:
            assert banks.outer.head_rows is not None
            self._outer_bytes -= banks.outer.head_rows.nbytes
        self.embed, self.norm_of = banks.embed, banks.norm_of
        self.heads, self.out = self._attention.heads, self._attention.out
        self._device: DevicePasses | None = None
        """Made for the first of its passes."""
        self._passes: DevicePasses | None = None
        """Of the pass that runs, where it is the device's own."""

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        self._passes = None if tokens.steps else self._on_device()
        if self._passes is not None:
            self.norm_of, self.heads, self.out = self._passes.norm_of, self._passes.heads, self._passes.out
            self._passes.begin(len(tokens.ids), kv)
            return
        if self._device is not None:
            self._device.host_pass(kv, tokens.steps)
        self.norm_of, self.heads, self.out = self._banks.norm_of, self._attention.heads, self._attention.out
        self._generated = tokens.generated
        self._reads.bytes += self._outer_bytes
        self._attention.begin(tokens, kv, self._few, self._reads)

    def observe(self, neurons: Observer | None, heads: HeadObserver | None) -> None:
        """From now on tell these of what tokens use; None: nobody."""
        self._observer, self._attention.observer = neurons, heads

    def reads(self) -> Reads:
        reads, self._reads = self._reads, Reads()
        if self._lm is not None:
            head = self._lm.reads()
            reads.bytes += head.bytes
            reads.fallbacks += head.fallbacks
        return reads

    @property
    def reads_more_at_random(self) -> bool:
        return self._lm is not None

    def begin_round(self, view: KVView, seq_ids: Sequence[int], late: bool, random: bool) -> None:
        self._on_device().begin_round(view, seq_ids, late, random)

    def send_reads(self) -> None:
        if self._device is not None:
            self._device.send_reads()

    def device_reads(self) -> Reads:
        return Reads() if self._device is None else self._device.reads()

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        if self._passes is not None:
            return self._passes.qkv(layer, x)
        selector = self._neurons[layer]
        if selector is not None and selector.scorer.reads == "ahead" and any(self._generated):
            self._look_ahead(layer, x)
        return self._attention.qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        if self._passes is not None:
            return self._passes.mlp(layer, x, residual)
        self._attention.look_ahead(layer + 1, x)
        bank, selector, generated = self._banks.ffn[layer], self._neurons[layer], sum(self._generated)
        neurons, tokens = len(bank.order), x.shape[0]
        self._reads.neurons_of += neurons * generated
        if selector is None or not generated:
            self._count(layer, neurons, neurons, neurons * generated)
            return bank.out(bank.hidden(x), residual=residual)
        self._reads.bytes += selector.scorer.bytes
        if tokens == 1 and self._one_call[layer]:
            self._count(layer, selector.keep, selector.keep, selector.keep)
            return plus(_in_one_call(bank, selector, x), residual)
        chosen = self._ahead if selector.scorer.reads == "ahead" else selector(x, self._few)
        assert chosen is not None
        ids, own = chosen.ids, chosen.own
        rows = neurons if ids is None else len(ids)
        if own is None and not selector.reranks and chosen.scored.proxy:
            self._count(layer, rows, rows, rows)
            return bank.ffn(x, ids, residual)
        hidden = _hidden(bank, x, ids, chosen.scored)
        if selector.reranks:
            score = bank.score(hidden, ids, selector.norms)
            own = selector.rerank(score if own is None else score.masked_fill_(~own, float("-inf")), ids)
        if generated < tokens:
            assert own is not None
            own = own | ~torch.tensor(self._generated, device=x.device)[:, None]
        used = rows if own is None else int(own.sum()) - neurons * (tokens - generated)
        out_rows = rows if own is None or not _skips(bank, hidden, ids) else int(own.any(0).sum())
        self._count(layer, rows, out_rows, used, chosen.scored)
        if self._observer is not None and ids is None and own is not None:
            self._observer(layer, selector, hidden, own)
        return bank.out(hidden if own is None else hidden * own, ids, residual)

    def _look_ahead(self, layer: int, x: Tensor) -> None:
        """What the layer's MLP will read, by the attention's input."""
        selector = self._neurons[layer]
        assert selector is not None
        self._ahead = selector(x, self._few)

    def head(self, x: Tensor) -> Tensor:  # [T, D] -> [T, V_local]
        if self._passes is not None:
            return self._passes.head(x)
        if self._lm is None:
            return self._banks.head(x)
        outer = self._banks.outer
        return outer.pad(self._lm.logits(outer.head_input(x)))

    def _on_device(self) -> DevicePasses:
        if self._device is None:
            assert self.on_device, "rows are chosen by the host"
            heads = [selector for selector in self._heads if not isinstance(selector, HeadOracle)]
            self._device = self._device_passes()(
                self._banks, self._neurons, heads, self._sparse_tokens, self._outer_bytes, self._lm
            )
        return self._device

    def _device_passes(self) -> type[DevicePasses]:
        from rowcast.runtime.sparse.on_device import DevicePasses

        return DevicePasses

    @property
    def _few(self) -> bool:
        """Whether the pass is one that reads unions."""
        return len(self._generated) <= self._sparse_tokens and all(self._generated)

    def _count(self, layer: int, in_rows: int, out_rows: int, used: int, scored: Scored | None = None) -> None:
        """What a scorer has found exactly it has read, and has counted among its own bytes."""
        bank = self._banks.ffn[layer]
        row_bytes = bank.in_row_bytes
        if scored is not None and not scored.proxy:
            row_bytes = bank.up[0].nbytes + (0 if bank.up_bias is None else bank.up_bias.itemsize) if scored.hidden is None else 0
        self._reads.use("neurons", used, layer if self._chooses else None)
        self._reads.bytes += in_rows * row_bytes + out_rows * bank.out_row_bytes
        if bank.down_bias is not None:
            self._reads.bytes += bank.down_bias.nbytes


def _whole_bytes(bank: AttentionBank) -> int:
    """Of the biases, which every pass reads."""
    return sum(bias.nbytes for bias in (bank.q_bias, bank.k_bias, bank.v_bias, bank.o_bias) if bias is not None)


def _in_one_call(bank: FfnBank, selector: Selector, x: Tensor) -> Tensor:  # [1, D] -> [1, D]
    weight = selector.in_one_call
    assert weight is not None and bank.gate is not None
    norms = bank.norms if selector.norms is None else selector.norms
    return lowbit.gated_ffn(weight, norms, selector.keep, bank.gate, bank.up, bank.down, x, bank.activation, selector.shards)


def _skips(bank: FfnBank, hidden: Tensor, ids: Tensor | None) -> bool:
    """Whether `FfnBank.out` leaves out rows that no token has a use for: the native part does, a GPU and library products do not."""
    return (
        not gpu.takes(hidden)
        and (ids is not None or len(hidden) <= FEW_TOKENS)
        and library_for_tables(hidden, bank.down) is not None
    )


def _hidden(bank: FfnBank, x: Tensor, ids: Tensor | None, scored: Scored) -> Tensor:
    """Activations of the rows `ids` (None: all), [T, C]; what the scorer has found exactly is taken from it."""
    if scored.hidden is not None:
        return scored.hidden if ids is None else scored.hidden.index_select(1, ids)
    if scored.gate is not None:
        return (scored.gate if ids is None else scored.gate.index_select(1, ids)) * product(bank.up, x, bank.up_bias, ids)
    return bank.hidden(x, ids)
