"""From a rung's settings to its sparse weight view: proxies made from the weights, predictors taken from a calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rowcast.errors import UserError
from rowcast.kernels import lowbit
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.ladder.spec import Cut, Rung
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.checks import AHEAD, BITS, DIRECTIONS, check_scorer, head_bits
from rowcast.runtime.sparse.heads import HeadSelector
from rowcast.runtime.sparse.lm_head import CertifiedHead
from rowcast.runtime.sparse.scorers import FewBits, Gate, InputMap, LowRank, Oracle, Proxy, Reads, Scorer
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.sizes import asks, kept_neurons, layer_shares
from rowcast.runtime.sparse.weights import SparseWeights


def build_view(
    banks: BankWeights, rung: Rung, calibration: Calibration | None, view: Callable[..., SparseWeights] = SparseWeights
) -> SparseWeights:
    """The weights that a sparse rung reads, as `view` makes them of such banks. Precondition: `check_rung` has passed. Raises UserError
    where the LM head's rows are held in a library's layout only."""
    neurons: list[Selector | None] = [None] * banks.spec.num_layers
    if rung.mlp is not None:
        how = _How(rung.mlp, rung.by or "q4", rung.over, rung.cut, rung.common or 0.0, rung.group, calibration)
        shares = layer_shares(rung.mlp, banks.spec.num_layers, calibration, how.by if how.cut == "threshold" else None)
        for layer, asked in enumerate(asks(shares, banks.spec.intermediate_size)):
            # The device finds rows that are fetched by a selector, even if it is of all of them.
            if asked or getattr(banks.ffn[layer], "on_device", False):
                neurons[layer] = _selector(banks, layer, shares[layer], how)
    lm = None
    if rung.lm == "hire":
        if banks.outer.head_rows is None:
            raise UserError(
                "lm=hire needs the LM head in rows, which this number format packs on CPUs; use dtype=float32 or lm=full"
            )
        directions = None
        if calibration is not None and DIRECTIONS in calibration:
            directions = calibration.tensor(DIRECTIONS, (None, banks.spec.embed_size))
        lm = CertifiedHead(banks.outer.head_rows, bits=head_bits(calibration), directions=directions)
    return view(banks, neurons, heads=None if rung.heads is None else _build_heads(banks, rung, calibration), lm=lm)


def _build_heads(banks: BankWeights, rung: Rung, calibration: Calibration | None) -> list[HeadSelector]:
    assert calibration is not None and rung.heads is not None
    spec, device = banks.spec, banks.ffn[0].up_down.device
    keep = max(1, round(rung.heads * spec.num_heads))
    return [
        HeadSelector.calibrated(calibration, layer, keep=keep, reads=rung.heads_by, spec=spec, shard=banks.shard, device=device)
        for layer in range(spec.num_layers)
    ]


def build_neurons(
    banks: BankWeights,
    *,
    mlp: float,
    by: str,
    over: float = 1.0,
    cut: Cut = "top",
    common: float = 0.0,
    group: int = 1,
    calibration: Calibration | None = None,
) -> list[Selector]:
    """For each layer a selector that keeps a share of the neurons, `mlp` on average over layers.

    The calibration says which layers need more of them; without one all have the same. `over`: candidates over those kept. `cut`,
    `common`, `group`: as in `Rung`; the first two need a calibration. Raises UserError as `check_scorer` does.
    """
    check_scorer(by, banks.spec, calibration)
    how = _How(mlp, by, over, cut, common, group, calibration)
    shares = layer_shares(mlp, banks.spec.num_layers, calibration, by if cut == "threshold" else None)
    return [_selector(banks, layer, share, how) for layer, share in enumerate(shares)]


@dataclass(frozen=True, slots=True)
class _How:
    """Neurons are chosen, as `build_neurons` takes it."""

    mlp: float
    by: str
    over: float
    cut: Cut
    common: float
    group: int
    calibration: Calibration | None


def _selector(banks: BankWeights, layer: int, share: float, how: _How) -> Selector:
    """One that keeps this share of the layer's neurons."""
    bank, neurons, shard, calibration = banks.ffn[layer], banks.spec.intermediate_size, banks.shard, how.calibration
    norms = column_norms(bank, layer, calibration, neurons)
    found = scorer(how.by, bank, layer, calibration, neurons, norms)
    device, keep = bank.up_down.device, kept_neurons(share, neurons)
    if how.cut == "threshold":
        assert calibration is not None
        levels = calibration.levels(how.by)
        if levels is None:
            threshold = layer_threshold(calibration, layer, how.by, share)
        else:
            threshold = interpolated(calibration.densities, levels, how.mlp)
        return Selector(found, neurons, keep=keep, threshold=threshold, shard=shard)
    if how.common:
        assert calibration is not None
        frequency = calibration.tensor(f"layers.{layer}.frequency", (neurons,))[bank.order].to(device)
        always = min(keep, round(how.common * neurons))
        return Selector(found, neurons, keep=keep, over=how.over, common=always, frequency=frequency, shard=shard, norms=norms)
    return Selector(found, neurons, keep=keep, over=how.over, group=how.group, shard=shard, device=device, norms=norms)


def column_norms(bank: FfnBank, layer: int, calibration: Calibration | None, neurons: int) -> Tensor:
    """What each neuron's column counts for in its score, [N] float32: its length, times its sensitivity where the calibration has it.
    `neurons`: of the whole layer. Raises UserError for sensitivities that are none."""
    found = None if calibration is None else calibration.sensitivity(layer, neurons)
    return bank.norms if found is None else bank.norms * torch.from_numpy(found)[bank.order].to(bank.norms.device)


def layer_threshold(calibration: Calibration, layer: int, by: str, share: float) -> float:
    """The score above which a mean share of a layer's neurons lies, 0 < share <= 1, by the calibration's thresholds [G]."""
    grid = calibration.densities
    return interpolated(grid, calibration.tensor(f"layers.{layer}.{by}.thresholds", (len(grid),)).tolist(), share)


def interpolated(grid: Sequence[float], table: Sequence[float], share: float) -> float:
    """The score above which a mean share of neurons lies, 0 < share <= 1, of those for a grid of densities, of which the last is 1.

    Between the grid's densities in the logarithm of the score, where scores are above 0. Below the grid its first one.
    """
    if share >= 1:
        return -math.inf
    above = next(i for i, density in enumerate(grid) if density >= share)
    if above == 0:
        return float(table[0])
    low, high = table[above - 1], table[above]
    if high == -math.inf:  # no score was looked at: those of most scorers are not below 0
        high = min(low, 0.0)
    weight = (share - grid[above - 1]) / (grid[above] - grid[above - 1])
    return float(low * (high / low) ** weight if min(low, high) > 0 else low + weight * (high - low))


def scorer(
    by: str,
    bank: FfnBank,
    layer: int,
    calibration: Calibration | None,
    neurons: int | None = None,
    norms: Tensor | None = None,
) -> Scorer:
    """One layer's scorer. `neurons`: of the whole layer, where the bank is a rank's share. `norms`: its `column_norms`, where they are
    at hand. Precondition: `check_scorer` has passed."""
    name, ahead = by.removesuffix(AHEAD), by.endswith(AHEAD)
    if norms is None:
        norms = column_norms(bank, layer, calibration, neurons or len(bank.order))
    if name == "oracle":
        return Oracle(bank, norms)
    if name == "gate":
        return Gate(bank)
    gated = bank.gated
    reads: Reads = "ahead" if ahead else "own"
    if name in BITS:
        tables = [table for table in (bank.gate, bank.up) if table is not None]
        biases = [bias for bias in (bank.gate_bias, bank.up_bias) if bias is not None]
        few = FewBits(lowbit.quantise(torch.cat(tables), BITS[name]), torch.cat(biases).float() if biases else None)
        return Proxy(few, norms, bank.activation, gated, reads, _input_map(layer, calibration, bank) if ahead else None)
    assert calibration is not None
    device = bank.up_down.device
    hidden, rows = bank.up_down.shape[-1], (neurons or len(bank.order)) * (2 if gated else 1)
    a = calibration.tensor(f"layers.{layer}.{by}.a", (None, hidden)).float().to(device)
    b = calibration.tensor(f"layers.{layer}.{by}.b", (rows, len(a))).float().to(device)
    bias = calibration.tensor(f"layers.{layer}.{by}.bias", (rows,)).float().to(device)
    order = bank.order.to(device)
    own = torch.cat([order, order + len(b) // 2]) if gated else order
    return Proxy(LowRank(lowbit.quantise(a, 8), lowbit.quantise(b[own], 8), bias[own]), norms, bank.activation, gated, reads)


def _input_map(layer: int, calibration: Calibration | None, bank: FfnBank) -> InputMap:
    assert calibration is not None
    matrix = calibration.tensor(f"layers.{layer}.ahead.matrix", (bank.up_down.shape[-1],) * 2).float().to(bank.up_down.device)
    return InputMap(lowbit.quantise(matrix, 8))
