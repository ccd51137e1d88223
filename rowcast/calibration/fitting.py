"""Everything that one layer's calibration consists of, from its moments and some of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.curves import BLOCK_ELEMENTS, Rows, found, frequencies, lost_curve, thresholds
from rowcast.calibration.fits import Factors, compose, least_squares, linear_map, low_rank
from rowcast.calibration.mlp import Mlp
from rowcast.calibration.moments import Moments
from rowcast.calibration.training import train
from rowcast.kernels import lowbit
from rowcast.runtime.sparse.scorers import FewBits, InputMap, LowRank, PreActivations, Proxy

DENSITIES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of curves by density."""
JUDGED = (0.05, 0.1, 0.25, 0.35, 0.5, 0.7)
"""Densities that recall is measured at."""
FREQUENCY_ROWS, LOST_ROWS, THRESHOLD_ROWS = 8192, 512, 512
CURVE_POINTS = 33
TRAINED_FOR = 0.5
"""Density that predictors are trained for; in ReLU models neurons are active or not, and the share of active ones is."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Wish:
    """What fits aim at."""

    rank: int
    recall: float
    """That over-selection is to reach."""
    train_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Of one layer: tokens to fit to and tokens to judge by, the same tokens in all layers."""

    fit: Rows
    held: Rows


@dataclass(frozen=True, slots=True)
class LayerResult:
    """`tensors` by their names behind `layers.{i}.`; `figures` go into the description."""

    tensors: Tensors
    figures: dict[str, Any]


def default_rank(hidden: int, signed: bool) -> int:
    """Half of the hidden size; for ReLU models, whose sets are smaller, a quarter within 128..256."""
    return min(hidden, max(128, min(256, hidden // 4))) if signed else max(1, hidden // 2)


def fit_layer(mlp: Mlp, moments: Moments, rows: LayerRows, before: Tensors | None, wish: Wish) -> LayerResult:
    """`moments` are of (attention's input, MLP's input); `before`: the previous layer's MLP inputs of the tokens of `rows`, by fit and
    held (None in the first layer)."""
    composed = compose(mlp.weight, mlp.bias, least_squares(moments))
    starts = {
        "own": low_rank(mlp.weight, mlp.bias, moments.y_covariance, moments.y_mean, wish.rank),
        "ahead": low_rank(*composed, moments.x_covariance, moments.x_mean, wish.rank),
    }
    inputs = {"own": rows.fit.mlp, "ahead": rows.fit.attention}
    often, mass = frequencies(mlp, _some(rows.fit.mlp, FREQUENCY_ROWS))
    density = float(often.mean()) if mlp.signed else TRAINED_FOR
    trained = {
        reads: train(start, mlp, inputs[reads], rows.fit.mlp, density=density, steps=wish.train_steps, seed=wish.seed)
        for reads, start in starts.items()
    }
    tensors: Tensors = {"frequency": often, "ahead.matrix": linear_map(moments).half()}
    for reads, suffix in (("own", ""), ("ahead", "-ahead")):
        tensors |= _stored(f"lowrank{suffix}", starts[reads]) | _stored(f"dejavu{suffix}", trained[reads][0])
    lost = lost_curve(mlp, _some(rows.fit.mlp, LOST_ROWS), DENSITIES)
    tensors["lost"] = torch.tensor(lost)
    scorers = _scorers(mlp, tensors)
    sample = rows.fit[:: -(-len(rows.fit.mlp) // min(THRESHOLD_ROWS, max(1, BLOCK_ELEMENTS // mlp.neurons)))]
    tensors |= {f"{name}.thresholds": thresholds(scorer(sample), DENSITIES) for name, scorer in scorers.items()}
    judged = found(scorers, mlp, rows.held, JUDGED, wish.recall)
    heads, head_figures = _fit_heads(rows, before)
    return LayerResult(
        {name: tensor.contiguous().cpu() for name, tensor in (tensors | heads).items()},
        {
            "lost": lost,
            "active": float(often.mean()),
            "hot": _hot(often, mass),
            "scorers": {name: asdict(result) for name, result in judged.items()},
            "trained": {reads: {"lost": least, "initial": initial} for reads, (_, least, initial) in trained.items()},
            "heads": head_figures,
        },
    )


def _some(rows: Tensor, count: int) -> Tensor:
    """At most `count` of them, evenly spread."""
    return rows[:: -(-len(rows) // count)]


def _stored(name: str, factors: Factors) -> Tensors:
    # Between the factors any scale is right; with equal largest values neither leaves the range of 16 bits.
    scale = (factors.b.abs().max() / factors.a.abs().max()).sqrt()
    return {
        f"{name}.a": (factors.a * scale).half(),
        f"{name}.b": (factors.b / scale).half(),
        f"{name}.bias": factors.bias.clone(),
    }


def _scorers(mlp: Mlp, tensors: Tensors) -> dict[str, Callable[[Rows], Tensor]]:
    """All proxies as a sparse view runs them, rounding included."""
    few: dict[str, PreActivations] = {f"q{bits}": FewBits(lowbit.quantise(mlp.weight, bits), mlp.bias) for bits in lowbit.BITS}
    input_map = InputMap(lowbit.quantise(tensors["ahead.matrix"].float(), 8))
    scorers: dict[str, Callable[[Rows], Tensor]] = {}
    for name, pre in few.items():
        scorers[name] = _own(_proxy(mlp, pre))
        scorers[f"{name}-ahead"] = _ahead(_proxy(mlp, pre, input_map))
    for kind in ("lowrank", "dejavu"):
        scorers[kind] = _own(_proxy(mlp, _low_rank(tensors, kind)))
        scorers[f"{kind}-ahead"] = _ahead(_proxy(mlp, _low_rank(tensors, f"{kind}-ahead")))
    return scorers


def _proxy(mlp: Mlp, pre: PreActivations, ahead: InputMap | None = None) -> Proxy:
    return Proxy(pre, mlp.norms, mlp.activation, mlp.gated, ahead=ahead)


def _low_rank(tensors: Tensors, name: str) -> LowRank:
    a, b = (lowbit.quantise(tensors[f"{name}.{part}"].float(), 8) for part in ("a", "b"))
    return LowRank(a, b, tensors[f"{name}.bias"])


def _own(scorer: Proxy) -> Callable[[Rows], Tensor]:
    return lambda rows: scorer(rows.mlp).values


def _ahead(scorer: Proxy) -> Callable[[Rows], Tensor]:
    return lambda rows: scorer(rows.attention).values


def _fit_heads(rows: LayerRows, before: Tensors | None) -> tuple[Tensors, dict[str, list[float]]]:
    """Linear predictors of the logarithm of each head's contribution, and their recall by heads kept, 1..H."""
    inputs = {"own": (rows.fit.attention, rows.held.attention)}
    if before is not None:
        inputs["ahead"] = before["fit"], before["held"]
    tensors, figures = {}, {}
    for reads, (fit, held) in inputs.items():
        moments = Moments.zero(fit.shape[1], rows.fit.heads.shape[1], fit.device)
        moments.add(fit, _log(rows.fit.heads))
        predictor = least_squares(moments)
        tensors[f"heads.{reads}.weight"], tensors[f"heads.{reads}.bias"] = predictor.weight, predictor.bias
        ranks = rows.held.heads.argsort(1, descending=True).argsort(1)
        of_best = ranks.gather(1, predictor(held).argsort(1, descending=True))
        counts = range(1, ranks.shape[1] + 1)
        figures[reads] = [float((of_best[:, :keep] < keep).float().mean()) for keep in counts]
    return tensors, figures


def _log(norms: Tensor) -> Tensor:
    return norms.clamp_min(1e-6).log()


def _hot(often: Tensor, mass: Tensor) -> list[float]:
    """Share of all contributions that come from the most frequent 0..100% of the neurons, at `CURVE_POINTS` points."""
    share = torch.cat([mass.new_zeros(1), mass[often.argsort(descending=True)].cumsum(0)]) / mass.sum().clamp_min(1e-12)
    points = torch.linspace(0, len(mass), CURVE_POINTS, device=mass.device).round().long()
    return [round(float(value), 4) for value in share[points]]
