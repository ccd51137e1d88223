"""Selection, and whole sparse MLPs with their predictors, beside torch and dense cuBLAS products. One token, bf16, random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.bench.kernel_cases.case import Case
from rowcast.bench.kernel_cases.lowbit import random_weight
from rowcast.kernels.gpu import lowbit, products, select
from rowcast.kernels.gpu.select import Places
from rowcast.kernels.lowbit import LowBit

_CALLS: Final = 50
"""Of a selection, whose inputs lie in the L2 in a real step, too."""
_MLPS: Final = 6


def cases(device_name: str) -> Iterator[Case]:
    """Selection of 10% of 12,288 and of 5% of 14,336; an OPT-175B layer split over 4 ranks; a gated MLP of a 1B model."""
    for total, keep in ((12288, 1229), (14336, 717)):
        yield _top(total, keep)
        yield _above(total, keep)
        yield _rerank(total, keep)
    yield _predicted(12288, 12288, 1229, 512)
    for over in (1.0, 1.5):
        yield _hire(2048, 16384, 819, over)


def _random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)


def _top(total: int, keep: int) -> Case:
    places = Places.of(total, keep)

    def ours(scores: Tensor) -> Callable[[], object]:
        return lambda: select.top_ids(scores, places)

    def topk(scores: Tensor) -> Callable[[], object]:
        return lambda: torch.topk(scores, keep)

    scores = [torch.randn(1, total, device="cuda") for _ in range(_CALLS)]
    shape = f"{keep} of {total} in 8 shards"
    return Case(
        "top ids", shape, 4 * (total + keep), [ours(each) for each in scores], {"torch.topk": [topk(each) for each in scores]}
    )


def _above(total: int, keep: int) -> Case:
    threshold = float(torch.randn(1 << 20, device="cuda").quantile(1 - keep / total))

    def ours(scores: Tensor) -> Callable[[], object]:
        return lambda: select.above_ids(scores, threshold)

    scores = [torch.randn(1, total, device="cuda") for _ in range(_CALLS)]
    return Case("above ids", f"about {keep} of {total}", 4 * (total + keep), [ours(each) for each in scores])


def _rerank(total: int, keep: int) -> Case:
    places, first = Places.of(total, keep), Places.of(total, keep * 3 // 2)
    norms = torch.rand(total, device="cuda")

    def ours(hidden: Tensor) -> Callable[[], object]:
        chosen = select.top_ids(torch.randn(1, total, device="cuda"), first)
        return lambda: select.rerank_one(hidden, chosen, places, norms)

    hidden = [_random(1, first.keep) for _ in range(_CALLS)]
    shape = f"{keep} of {first.keep} of {total} in 8 shards"
    return Case("re-rank", shape, 10 * first.keep + 6 * keep, [ours(each) for each in hidden])


@dataclass(frozen=True, slots=True)
class _Bank:
    """An MLP as the bank layout has it: gate [N, D] or None, up and down [N, 2, D], and norms [N]."""

    gate: Tensor | None
    up_down: Tensor
    norms: Tensor

    @classmethod
    def random(cls, columns: int, neurons: int, gated: bool) -> _Bank:
        gate = _random(neurons, columns) if gated else None
        return cls(gate, _random(neurons, 2, columns), torch.rand(neurons, device="cuda"))

    def dense(self) -> Callable[[], object]:
        """Its products by cuBLAS, on tables of their own, as a library would hold them; nothing between them."""
        up, down = self.up_down[:, 0].contiguous(), self.up_down[:, 1].contiguous()
        x, hidden = _random(1, up.shape[1]), _random(1, up.shape[0])

        def run() -> None:
            if self.gate is not None:
                F.linear(x, self.gate)
            F.linear(x, up)
            torch.mm(hidden, down)

        return run


def _predicted(columns: int, neurons: int, keep: int, rank: int) -> Case:
    """A ReLU MLP whose neurons a low-rank predictor of 8 bits chooses."""
    places = Places.of(neurons, keep)
    banks = [_Bank.random(columns, neurons, gated=False) for _ in range(2)]
    bias = _random(neurons)

    def ours(bank: _Bank, a: LowBit, b: LowBit, x: Tensor) -> Callable[[], object]:
        up, down = bank.up_down[:, 0], bank.up_down[:, 1]

        def run() -> Tensor:
            scores = lowbit.scores(b, lowbit.product(a, x), bank.norms, "relu")
            chosen = select.top_ids(scores, places)
            hidden = products.ffn_hidden(None, up, None, bias, x, chosen.ids, chosen.count, "relu")
            return products.rows_out(down, hidden, chosen.ids, chosen.count)

        return run

    calls, moved = [], 0
    for call in range(_MLPS):
        a, b = random_weight(rank, columns, 8), random_weight(neurons, rank, 8)
        calls.append(ours(banks[call % 2], a, b, _random(1, columns)))
        moved = a.bytes + b.bytes + keep * 2 * columns * 2
    shape = f"{columns} x {neurons} ReLU, {keep} neurons, predictor of rank {rank} in 8 bits"
    return Case("sparse MLP", shape, moved, calls, {"dense cublas": [bank.dense() for bank in banks]})


def _hire(columns: int, neurons: int, keep: int, over: float) -> Case:
    """A gated MLP whose neurons a 4-bit proxy chooses; with `over` > 1 it chooses more, which are computed exactly and ranked again."""
    places, first = Places.of(neurons, keep), Places.of(neurons, round(keep * over))
    banks = [_Bank.random(columns, neurons, gated=True) for _ in range(3)]

    def ours(bank: _Bank, proxy: LowBit, x: Tensor) -> Callable[[], object]:
        up, down = bank.up_down[:, 0], bank.up_down[:, 1]

        def run() -> Tensor:
            chosen = select.top_ids(lowbit.gated_scores(proxy, x, bank.norms, "silu"), first)
            hidden = products.ffn_hidden(bank.gate, up, None, None, x, chosen.ids, chosen.count, "silu")
            if over == 1:
                return products.rows_out(down, hidden, chosen.ids, chosen.count)
            ids, count, kept = select.rerank_one(hidden, chosen, places, bank.norms)
            return products.rows_out(down, kept, ids, count)

        return run

    calls, moved = [], 0
    for call in range(_MLPS + 3):
        proxy = random_weight(2 * neurons, columns, 4)
        calls.append(ours(banks[call % 3], proxy, _random(1, columns)))
        moved = proxy.bytes + (2 * first.keep + keep) * columns * 2
    shape = f"{columns} x {neurons} gated, {keep} neurons, 4-bit proxy" + (f", {first.keep} ranked again" if over > 1 else "")
    return Case("HiRE MLP", shape, moved, calls, {"dense cublas": [bank.dense() for bank in banks]})
