"""From a rung's settings to its sparse weight view: proxies made from the weights, predictors taken from a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from rowcast.errors import UserError
from rowcast.kernels import lowbit
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.ladder.spec import Rung, ScorerName
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.lm_head import CertifiedHead
from rowcast.runtime.sparse.scorers import FewBits, Gate, InputMap, LowRank, Oracle, Proxy, Reads, Scorer
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.spec import ModelSpec

DIRECTIONS = "head.directions"
"""Of the LM head, in a calibration."""

AHEAD = "-ahead"
"""Ending of the names of scorers that read the attention's input."""

BITS = {"q2": 2, "q3": 3, "q4": 4, "q8": 8}
FITTED = ("lowrank", "dejavu")
"""Scorers whose factors a calibration holds."""


def needs_calibration(by: str) -> bool:
    """Whether a scorer of that name cannot be made from the weights alone."""
    return by.removesuffix(AHEAD) in FITTED or by.endswith(AHEAD)


def check_scorer(by: str, spec: ModelSpec, calibration: Calibration | None) -> None:
    """Raise UserError where a model has no scorer of that name, or its calibration is missing or lacks it."""
    if by not in get_args(ScorerName):
        raise UserError(f"by={by!r:.60} is not a scorer; choose one of {', '.join(get_args(ScorerName))}")
    if by == "gate" and not spec.gated:
        raise UserError(f"by=gate needs a gated MLP, and {spec.family} has none; use by=q4")
    if not needs_calibration(by):
        return
    if calibration is None:
        raise UserError(f"by={by} needs a calibration; make one with rowcast calibrate and give --calibration DIR, or use by=q4")
    tensor = f"layers.0.{by}.a" if by.removesuffix(AHEAD) in FITTED else "layers.0.ahead.matrix"
    if tensor not in calibration:
        raise UserError(f"the calibration {calibration.path} has no scorer {by}; run rowcast calibrate again, or use by=q4")


def check_rung(rung: Rung, spec: ModelSpec, calibration: Calibration | None) -> None:
    """Raise UserError where a sparse rung cannot be had of this model, or lacks its calibration."""
    if rung.mlp is not None:
        check_scorer(rung.by or "q4", spec, calibration)
    if rung.heads is None:
        return
    if calibration is None:
        raise UserError(f"heads={rung.heads} needs a calibration; make one with rowcast calibrate and give --calibration DIR")
    if "layers.0.heads.own.weight" not in calibration:
        raise UserError(
            f"the calibration {calibration.path} does not tell heads apart; run rowcast calibrate again, or leave heads out"
        )


def build_view(banks: BankWeights, rung: Rung, calibration: Calibration | None) -> SparseWeights:
    """The weights that a sparse rung reads. Precondition: `check_rung` has passed. Raises UserError where the LM head's rows are held
    in a library's layout only."""
    neurons: Sequence[Selector | None] = [None] * banks.spec.num_layers
    if rung.mlp is not None:
        neurons = build_neurons(banks, mlp=rung.mlp, by=rung.by or "q4", over=rung.over, calibration=calibration)
    lm = None
    if rung.lm == "hire":
        if banks.outer.head_rows is None:
            raise UserError(
                "lm=hire needs the LM head in rows, which this number format packs on CPUs; use dtype=float32 or lm=full"
            )
        directions = calibration.tensor(DIRECTIONS) if calibration is not None and DIRECTIONS in calibration else None
        lm = CertifiedHead(banks.outer.head_rows, directions=directions)
    return SparseWeights(
        banks, neurons, heads=None if rung.heads is None else _build_heads(banks, rung.heads, calibration), lm=lm
    )


def _build_heads(banks: BankWeights, share: float, calibration: Calibration | None) -> list[HeadSelector]:
    assert calibration is not None
    spec, device = banks.spec, banks.ffn[0].up_down.device
    keep = max(1, round(share * spec.num_heads))
    return [
        HeadSelector.calibrated(calibration, layer, keep=keep, reads="own", spec=spec, shard=banks.shard, device=device)
        for layer in range(spec.num_layers)
    ]


def build_neurons(
    banks: BankWeights, *, mlp: float, by: str, over: float = 1.0, calibration: Calibration | None = None
) -> list[Selector]:
    """For each layer a selector that keeps a share of the neurons, `mlp` on average over layers.

    The calibration says which layers need more of them; without one all have the same. `over`: candidates over those kept.
    Raises UserError as `check_scorer` does.
    """
    check_scorer(by, banks.spec, calibration)
    shares = layer_shares(mlp, banks.spec.num_layers, calibration)
    selectors = []
    for layer, (bank, share) in enumerate(zip(banks.ffn, shares, strict=True)):
        neurons = len(bank.order)
        keep = min(neurons, max(1, round(share * neurons)))
        selectors.append(Selector(scorer(by, bank, layer, calibration), neurons, keep=keep, over=over))
    return selectors


def layer_shares(mean: float, layers: int, calibration: Calibration | None) -> list[float]:
    """The share of neurons that each layer keeps where they keep `mean` on average, from the calibration's `densities` [G, L]."""
    if calibration is None or mean >= 1:
        return [mean] * layers
    grid, table = calibration.densities, calibration.tensor("densities").float()
    above = next(i for i, density in enumerate(grid) if density >= mean)
    if above == 0:
        return (table[0] * (mean / grid[0])).tolist()
    weight = (mean - grid[above - 1]) / (grid[above] - grid[above - 1])
    return torch.lerp(table[above - 1], table[above], weight).tolist()


def scorer(by: str, bank: FfnBank, layer: int, calibration: Calibration | None) -> Scorer:
    """One layer's scorer. Precondition: `check_scorer` has passed."""
    name, ahead = by.removesuffix(AHEAD), by.endswith(AHEAD)
    if name == "oracle":
        return Oracle(bank)
    if name == "gate":
        return Gate(bank)
    gated = bank.gate is not None
    reads: Reads = "ahead" if ahead else "own"
    if name in BITS:
        tables = [table for table in (bank.gate, bank.up) if table is not None]
        biases = [bias for bias in (bank.gate_bias, bank.up_bias) if bias is not None]
        few = FewBits(lowbit.quantise(torch.cat(tables), BITS[name]), torch.cat(biases).float() if biases else None)
        return Proxy(few, bank.norms, bank.activation, gated, reads, _input_map(layer, calibration, bank) if ahead else None)
    assert calibration is not None
    device = bank.up_down.device
    a, b, bias = (calibration.tensor(f"layers.{layer}.{by}.{part}").float().to(device) for part in ("a", "b", "bias"))
    order = bank.order.to(device)
    own = torch.cat([order, order + len(b) // 2]) if gated else order
    return Proxy(LowRank(lowbit.quantise(a, 8), lowbit.quantise(b[own], 8), bias[own]), bank.norms, bank.activation, gated, reads)


def _input_map(layer: int, calibration: Calibration | None, bank: FfnBank) -> InputMap:
    assert calibration is not None
    matrix = calibration.tensor(f"layers.{layer}.ahead.matrix").float().to(bank.up_down.device)
    return InputMap(lowbit.quantise(matrix, 8))
