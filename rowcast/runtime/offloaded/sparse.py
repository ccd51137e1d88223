"""The sparse view over weights of which a part lies in host memory: only the rows that tokens need are fetched.

Passes over prompts, over many tokens, and layers whose rows do not go into the buffer stream whole layers, as the dense view does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rowcast.kernels import gpu
from rowcast.runtime.banks import AttentionBank, FfnBank
from rowcast.runtime.offloaded.attention import PlacedAttention
from rowcast.runtime.offloaded.ffn import PlacedFfn
from rowcast.runtime.offloaded.weights import OffloadedBanks
from rowcast.runtime.protocols import ALL_HEADS, Heads, KVView, Reads, Tokens
from rowcast.runtime.sparse.heads import HeadOracle, HeadSelector
from rowcast.runtime.sparse.lm_head import CertifiedHead
from rowcast.runtime.sparse.scorers import Gate
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.weights import SPARSE_TOKENS, SparseWeights

if TYPE_CHECKING:
    from rowcast.runtime.offloaded.on_device import DirectPasses
    from rowcast.runtime.sparse.on_device import DevicePasses


class OffloadedSparse(SparseWeights):
    """As `SparseWeights`. Where nothing but rows is fetched the device's own rounds find them, and in rounds that the host drives the
    device does, too, for few tokens and layers of which nothing is streamed or computed on the CPU. Of others the host asks it.
    """

    def __init__(
        self,
        banks: OffloadedBanks,
        neurons: Sequence[Selector | None],
        *,
        heads: Sequence[HeadSelector | HeadOracle | None] | None = None,
        lm: CertifiedHead | None = None,
        sparse_tokens: int = SPARSE_TOKENS,
    ) -> None:
        """As `SparseWeights`. Precondition: where heads are chosen all attention is resident; no scorer reads the gate exactly."""
        super().__init__(banks, neurons, heads=heads, lm=lm, sparse_tokens=sparse_tokens)
        self._offloaded = banks
        self._placed: list[Any] = list(banks.ffn)
        away = [isinstance(bank, PlacedAttention) for bank in banks.attention]
        assert not (any(away) and any(selector is not None for selector in self._heads)), "heads are chosen of streamed attention"
        assert not any(selector is not None and isinstance(selector.scorer, Gate) for selector in neurons)
        self._streams_attention = any(away)
        self._reachable = [
            isinstance(bank, PlacedFfn)
            and bank.on_device
            and selector is not None
            and selector.on_device
            and not (selector.reranks and selector.candidates > bank.room)
            for bank, selector in zip(self._placed, neurons, strict=True)
        ]
        """Of each layer, whether few tokens' neurons can be found and fetched without the host."""
        # Copies of pieces are started by the host.
        self.on_device &= not banks.streams_outer and all(isinstance(bank, AttentionBank) for bank in banks.attention)
        self.on_device &= all(
            reachable or isinstance(bank, FfnBank) for bank, reachable in zip(self._placed, self._reachable, strict=True)
        )
        self._direct: DirectPasses | None = None
        """Made for the first pass that the host drives and the device finds rows for."""
        self._directly = False
        """Whether the pass that runs is one."""
        if self._streams_attention:
            self._outer_bytes += sum(bank.nbytes for bank in map(_any, banks.attention) if isinstance(bank, PlacedAttention))
            self._outer_bytes += sum(
                bank.qkv.nbytes + bank.o.nbytes for bank, streamed in zip(banks.attention, away, strict=True) if not streamed
            )

    def begin(self, tokens: Tokens, kv: KVView) -> None:
        super().begin(tokens, kv)
        if self._passes is not None:
            return
        if self._streams_attention:
            self.heads, self.out = self._all_heads, self._offloaded.out
        self._offloaded.stream(len(tokens.ids), rows=self._few)
        self._directly = self._few and any(self._reachable) and gpu.serves(tokens.ids.device)
        if self._directly:
            self._direct_passes().begin()

    def reads(self) -> Reads:
        reads = super().reads()
        if self._direct is not None:
            layers, direct = self.spec.num_layers, self._direct.reads()
            reads = Reads.of([*map(sum, zip(reads.numbers(layers), direct.numbers(layers), strict=True))], layers)
        return reads

    def send_reads(self) -> None:
        if self._device is not None and self._offloaded.pool is not None:
            self._offloaded.pool.rows.send()
        super().send_reads()

    def device_reads(self) -> Reads:
        if self._device is not None and self._offloaded.pool is not None:
            self._offloaded.pool.rows.read()
        return super().device_reads()

    def qkv(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [T, D] -> [T, H, d], [T, K, d], [T, K, d]
        if not self._streams_attention:
            return super().qkv(layer, x)
        selector = self._neurons[layer]
        if selector is not None and selector.scorer.reads == "ahead" and any(self._generated):
            self._look_ahead(layer, x)
        count = sum(self._generated)
        self._reads.heads += count * self._offloaded.split.heads
        self._reads.heads_of += count * self._offloaded.split.heads
        return self._offloaded.qkv(layer, x)

    def mlp(self, layer: int, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [T, D] -> [T, D]
        if self._passes is not None:
            return self._passes.mlp(layer, x, residual)
        bank, selector, generated = self._placed[layer], self._neurons[layer], sum(self._generated)
        if not isinstance(bank, PlacedFfn):
            return super().mlp(layer, x, residual)
        self._attention.look_ahead(layer + 1, x)
        neurons, tokens = len(bank.order), len(x)
        self._reads.neurons_of += neurons * generated
        if self._directly and self._reachable[layer]:
            return self._direct_passes().mlp(layer, x, residual)
        if selector is None or not generated:
            self._count_placed(layer, neurons, neurons, neurons * generated)
            return bank.mlp(x, residual)
        self._reads.bytes += selector.scorer.bytes
        chosen = self._ahead if selector.scorer.reads == "ahead" else selector(x, self._few)
        assert chosen is not None
        ids, own = chosen.ids, chosen.own
        if ids is not None and bank.overflows(ids):
            own, ids = _spread(own, ids, tokens, neurons), None
            self._reads.overflows += 1
        hidden = None
        if selector.reranks:
            hidden = bank.hidden(x, ids)
            score = bank.score(hidden, ids, selector.norms)
            own = selector.rerank(score if own is None else score.masked_fill_(~own, float("-inf")), ids)
        if generated < tokens:
            assert own is not None
            own = own | ~_column(self._generated, own)
        rows = neurons if ids is None else len(ids)
        used = rows if own is None else int(own.sum()) - neurons * (tokens - generated)
        self._count_placed(layer, rows, rows, used)
        if hidden is not None:
            y = bank.out(hidden if own is None else hidden * own, ids, residual)
        elif ids is None:
            y = bank.mlp(x, residual, own)
        else:
            y = bank.chosen(x, ids, own, residual)
        bank.done()
        return y

    def _device_passes(self) -> type[DevicePasses]:
        from rowcast.runtime.offloaded.on_device import OffloadedPasses

        return OffloadedPasses

    def _look_ahead(self, layer: int, x: Tensor) -> None:
        if self._directly and self._reachable[layer]:
            self._direct_passes().look_ahead(layer, x)
        else:
            super()._look_ahead(layer, x)

    def _direct_passes(self) -> DirectPasses:
        if self._direct is None:
            from rowcast.runtime.offloaded.on_device import DirectPasses

            pairs = zip(self._placed, self._neurons, self._reachable, strict=True)
            self._direct = DirectPasses(
                [(bank, cast(Selector, selector)) if reachable else None for bank, selector, reachable in pairs]
            )
        return self._direct

    def _count_placed(self, layer: int, in_rows: int, out_rows: int, used: int) -> None:
        bank = self._placed[layer]
        self._reads.use("neurons", used, layer if self._chooses else None)
        self._reads.bytes += in_rows * bank.in_row_bytes + out_rows * bank.out_row_bytes
        if bank.down_bias is not None:
            self._reads.bytes += bank.down_bias.nbytes

    def _all_heads(self, layer: int) -> Heads:
        return ALL_HEADS


def _any(bank: Any) -> Any:
    return bank


def _spread(own: Tensor | None, ids: Tensor, tokens: int, neurons: int) -> Tensor:
    """Sets among the rows `ids` [C] as sets among all, [T, N] bool."""
    found = ids.new_zeros(tokens, neurons).bool()
    if own is None:
        found[:, ids] = True
    else:
        found[:, ids] = own
    return found


def _column(generated: list[bool], like: Tensor) -> Tensor:
    """[T, 1] bool."""
    return like.new_tensor(generated)[:, None]
