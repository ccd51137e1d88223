"""Scorers: how much each neuron would add to the MLP's output, exactly or by a cheap proxy.

A neuron's score is the size of its contribution, |activation| times the length of its column of the down projection; with ReLU the
signed pre-activation takes the activation's place, so that neurons just below zero rank above those far below. Where a calibration
tells how sensitive the model's output is to a neuron's column, its length counts so many times: scores are then nats, which compare
over layers. Scorers differ in what they find pre-activations by (exact rows, few bits, low rank) and in which hidden state they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from rowcast.kernels import lowbit
from rowcast.kernels.lowbit import LowBit
from rowcast.kernels.rows import ACTIVATIONS
from rowcast.runtime.banks import FfnBank, product
from rowcast.runtime.spec import Activation

Reads = Literal["own", "ahead"]
"""own: the MLP's input. ahead: the input of the same layer's attention, so that rows can be fetched while attention runs."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Of T tokens and N neurons; what was found exactly on the way need not be computed again."""

    values: Tensor
    """[T, N] float32: the higher, the more a neuron matters."""
    gate: Tensor | None = None
    """[T, N]: act(gate x), exact."""
    hidden: Tensor | None = None
    """[T, N]: activations, exact."""

    @property
    def proxy(self) -> bool:
        """Whether nothing exact was found."""
        return self.gate is None and self.hidden is None


class Scorer(Protocol):
    """Scores of one layer's neurons."""

    @property
    def reads(self) -> Reads: ...

    @property
    def bytes(self) -> int:
        """Read in one call."""
        ...

    def __call__(self, x: Tensor) -> Scored:
        """x [T, D], the hidden state that `reads` names."""
        ...


class PreActivations(Protocol):
    """Estimates of gate and up products."""

    @property
    def bytes(self) -> int:
        """Read in one call."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, 2 N] (gate, then up) float32 where the MLP is gated, else [T, N]."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """B (A x) + bias: HiRE-LR (arXiv 2402.09360, section 3.1) fitted on activations, or Deja Vu's predictor (arXiv 2310.17157)."""

    a: LowBit
    """[r, D], 8 bits."""
    b: LowBit
    """[J N, r], 8 bits; J = 2 where the MLP is gated."""
    bias: Tensor | None = None
    """[J N]."""

    @property
    def bytes(self) -> int:
        return self.a.bytes + self.b.bytes + _bytes(self.bias)

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, J N]
        y = lowbit.product(self.b, lowbit.product(self.a, x))
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class FewBits:
    """The weights in 2 to 8 bits: HiRE-Q (arXiv 2402.09360, section 3.1)."""

    weight: LowBit
    """[J N, D]."""
    bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.weight.bytes + _bytes(self.bias)

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, J N]
        y = lowbit.product(self.weight, x)
        return y if self.bias is None else y.add_(self.bias)


@dataclass(frozen=True, slots=True)
class InputMap:
    """An estimate of the hidden state one sub-layer on: x -> M x, by least squares (`calibration`)."""

    matrix: LowBit
    """[D, D], 8 bits."""

    @property
    def bytes(self) -> int:
        return self.matrix.bytes

    def __call__(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D] float32
        return lowbit.product(self.matrix, x)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Scores by estimated pre-activations."""

    pre: PreActivations
    norms: Tensor
    """[N] float32: what each neuron's column counts for, its length (`FfnBank.norms`) or this times its sensitivity."""
    activation: Activation
    gated: bool
    reads: Reads = "own"
    ahead: InputMap | None = None
    """Applied to the hidden state first."""

    @property
    def bytes(self) -> int:
        return self.pre.bytes + self.norms.nbytes + (0 if self.ahead is None else self.ahead.bytes)

    def __call__(self, x: Tensor) -> Scored:
        x = x if self.ahead is None else self.ahead(x)
        if self.gated and isinstance(self.pre, FewBits) and self.pre.bias is None:
            return Scored(lowbit.gated_scores(self.pre.weight, x, self.norms, self.activation))
        return Scored(contribution(self.pre(x), self.norms, self.activation, self.gated))


@dataclass(frozen=True, slots=True)
class Oracle:
    """Exact scores by exact rows: the bound of what choosing can do, for evaluation. It reads what it is meant to save."""

    bank: FfnBank
    norms: Tensor | None = None
    """As `Proxy.norms`; None: the lengths."""
    reads: Reads = "own"

    @property
    def bytes(self) -> int:
        return len(self.bank.order) * self.bank.in_row_bytes + self.bank.norms.nbytes

    def __call__(self, x: Tensor) -> Scored:
        hidden = self.bank.hidden(x)
        return Scored(self.bank.score(hidden, norms=self.norms), hidden=hidden)


@dataclass(frozen=True, slots=True)
class Gate:
    """|act(gate x)| with the exact gate rows; up and down rows are then read for the chosen (CATS, arXiv 2404.08763)."""

    bank: FfnBank
    reads: Reads = "own"

    @property
    def bytes(self) -> int:
        assert self.bank.gate is not None
        return self.bank.gate.nbytes + _bytes(self.bank.gate_bias)

    def __call__(self, x: Tensor) -> Scored:
        assert self.bank.gate is not None
        gate = ACTIVATIONS[self.bank.activation](product(self.bank.gate, x, self.bank.gate_bias))
        return Scored(gate.float().abs(), gate=gate)


def _bytes(table: Tensor | None) -> int:
    return 0 if table is None else table.nbytes


def contribution(pre: Tensor, norms: Tensor, activation: Activation, gated: bool) -> Tensor:
    """Scores from pre-activations [T, J N] and column norms [N] -> [T, N] float32."""
    pre = pre.float()
    if gated:
        gate, up = pre.chunk(2, -1)
        return (ACTIVATIONS[activation](gate) * up).abs_().mul_(norms)
    return pre * norms if activation == "relu" else ACTIVATIONS[activation](pre).abs_().mul_(norms)
