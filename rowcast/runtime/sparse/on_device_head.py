"""The certified LM head in rounds that the device runs by itself: lists of a fixed capacity, and all rows where one overflows."""

from __future__ import annotations

from torch import Tensor

from rowcast.kernels import gpu
from rowcast.kernels.gpu import lm_head
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.sparse.device_counts import DeviceCounts
from rowcast.runtime.sparse.lm_head import TOP, CertifiedHead


class DeviceHead:
    """`CertifiedHead.logits`, without a question to the device.

    Of equal bits with it are the exact rows alone: which others are among a token's `k` best by their bounds is judged more widely
    here, so that some rows are exact that are estimates there.
    """

    def __init__(self, banks: BankWeights, head: CertifiedHead, counts: DeviceCounts) -> None:
        self._banks, self._head, self._counts = banks, head, counts
        self._stages = [lm_head.Stage(stage.proxy, stage.correction, stage.radii) for stage in head.stages]
        self.best = TOP
        """Of each token's logits, so many are exact: one is enough where no token is drawn at random."""

    def logits(self, x: Tensor) -> Tensor:
        """[T, D] -> float32 [T, V_local]; the dense logits for more tokens than a fast product takes."""
        outer, rows, reads = self._banks.outer, self._head.rows, self._counts.pass_reads
        if len(x) > gpu.MOST_TOKENS:
            reads.bytes += rows.nbytes
            return self._banks.head(x)
        found = lm_head.logits(rows, self._stages, self._head.directions, outer.head_input(x), min(self.best, len(rows)))
        reads.bytes += self._head.bytes
        *refined, listed, of_all = found.counts.unbind()
        for count, stage in zip(refined, self._head.stages[1:], strict=True):
            self._counts.add("bytes", count, stage.row_bytes)
        for count in (listed, of_all):
            self._counts.add("bytes", count, rows[0].nbytes)
        self._counts.add("fallbacks", (of_all > 0).to(of_all.dtype), len(x))
        return outer.pad(found.values)
