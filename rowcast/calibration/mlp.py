"""One layer's MLP in the checkpoint's order and in single precision: the truth that scorers are fitted to and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.kernels.rows import ACTIVATIONS
from rowcast.runtime.banks import FfnBank
from rowcast.runtime.sparse.scorers import contribution
from rowcast.runtime.spec import Activation


@dataclass(frozen=True, slots=True)
class Mlp:
    """N neurons of D inputs; J = 2 where the MLP is gated, else 1."""

    weight: Tensor
    """[J N, D]: gate rows, then up rows."""
    bias: Tensor
    """[J N]."""
    down: Tensor
    """[N, D]."""
    norms: Tensor
    """[N]: lengths of the rows of `down`, times the neurons' sensitivities where these are known."""
    activation: Activation
    gated: bool

    @classmethod
    def of(cls, bank: FfnBank, sensitivity: Tensor | None = None) -> Mlp:
        """A copy of a bank's rows. `sensitivity` [N], in the checkpoint's order."""
        back = bank.order.argsort().to(bank.norms.device)
        tables = [bank.up] if bank.gate is None else [bank.gate, bank.up]
        biases = [bank.up_bias] if bank.gate is None else [bank.gate_bias, bank.up_bias]
        zero = torch.zeros_like(bank.norms)
        return cls(
            torch.cat([table[back].float() for table in tables]),
            torch.cat([zero if bias is None else bias[back].float() for bias in biases]),
            bank.down[back].float(),
            bank.norms[back] if sensitivity is None else bank.norms[back] * sensitivity.to(bank.norms.device),
            bank.activation,
            bank.gate is not None,
        )

    @property
    def neurons(self) -> int:
        return len(self.norms)

    @property
    def signed(self) -> bool:
        """Whether neurons are on or off (ReLU), so that scores have a sign."""
        return self.activation == "relu" and not self.gated

    def pre(self, h: Tensor) -> Tensor:  # [T, D] -> [T, J N]
        return F.linear(h, self.weight, self.bias)

    def hidden(self, pre: Tensor) -> Tensor:  # [T, J N] -> [T, N]
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(pre)
        gate, up = pre.chunk(2, -1)
        return act(gate) * up

    def scores(self, h: Tensor) -> Tensor:
        """Exact scores, [T, D] -> [T, N]."""
        return contribution(self.pre(h), self.norms, self.activation, self.gated)


def kept(neurons: int, density: float) -> int:
    """Neurons that a share of them is: at least one."""
    return min(neurons, max(1, round(density * neurons)))
