"""How often a rung's proposals stand, before any ran: as given, as a calibration measured it, or as published. Torch-free."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rowcast.errors import UserError
from rowcast.placement.hardware import Origin
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.spec import AdaptedSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Acceptance:
    """That the next token which a rung proposes stands before the rung above."""

    value: float
    low: float
    high: float
    origin: Origin
    source: str = ""


NEVER = Acceptance(0.0, 0.0, 0.0, "assumed", "depends on the text, so that it is counted as no help unless given")

_TRIFORCE = "TriForce, arXiv 2404.11912, table 1"
_LEAST = "least: the worst case of the rule 'coupled'"
_EXPERIMENTS = "docs/experiments.md, SmolLM2-135M-Instruct"

_RETRIEVAL = Acceptance(
    0.9234, 0.8902, 0.963, "assumed", f"{_TRIFORCE}: 4,096 of 122K entries, Yarn-Llama-2-7B-128K, T = 0; least: T = 1.2"
)
_FEW_ENTRIES = 4096
_LEAST_OF_FEW = 0.867
"""Of a budget below these: 256 of 7,900 entries, docs/experiments.md."""
_STREAMING = Acceptance(0.904, 0.853, 0.940, "assumed", f"{_EXPERIMENTS}: 1,024 of 7,900 entries; least: 256; most: free-running")
_EVICTION = Acceptance(0.910, 0.890, 0.929, "assumed", f"{_EXPERIMENTS}: 512 of 7,900 entries; least: 256; most: 1,024")
_DRAFT = Acceptance(
    0.55,
    0.38,
    0.72,
    "assumed",
    f"derived for a 68M draft over a streaming cache from {_TRIFORCE}: 2.31x with it, 1.80x without; least: from its 1.56x alone; "
    "most: as far up as down",
)
"""Solved for: (6 * 14 + 56) / (passes * (14 + 2 * 0.45) + 56) = 2.31 / 1.80, ms of the three passes, gammas 2 and 6; and of gammas up
to 4 the best (1 + a + ... + a^gamma) / (1 + gamma * 0.45 / 56) = 1.56."""
_BITS = {
    8: Acceptance(0.976, 0.952, 0.978, "assumed", f"{_EXPERIMENTS}, 8 bits; {_LEAST}"),
    4: Acceptance(
        0.614,
        0.443,
        0.9,
        "assumed",
        f"{_EXPERIMENTS}, weights that had been rounded before; most: QuantSpec, arXiv 2502.10424",
    ),
}

_DENSITIES = (0.25, 0.35, 0.5, 0.7)
_BY_SCORER = {
    "oracle": (0.745, 0.830, 0.907, 0.965),
    "q2": (0.612, 0.698, 0.785, 0.864),
    "q3": (0.706, 0.792, 0.866, 0.926),
    "q4": (0.738, 0.820, 0.896, 0.952),
    "q8": (0.746, 0.831, 0.907, 0.965),
    "lowrank": (0.662, 0.737, 0.810, 0.877),
    "dejavu": (0.661, 0.735, 0.807, 0.878),
    "gate": (0.330, 0.533, 0.713, 0.854),
    "q4-ahead": (0.652, 0.743, 0.824, 0.893),
    "lowrank-ahead": (0.596, 0.677, 0.765, 0.845),
    "dejavu-ahead": (0.607, 0.685, 0.773, 0.852),
}
"""At `_DENSITIES`: docs/experiments.md, 2026-11-22, news. Those that are missing there count as q4-ahead. By itself, as those below: a
rung drafts behind K/V of the exact model, and is right more often."""
_RELU_DENSITY, _RELU = 0.1, {"oracle": 0.984, "q4": 0.982, "q2": 0.962, "dejavu": 0.967, "q4-ahead": 0.955, "dejavu-ahead": 0.944}
"""The same of the ReLU model there."""
_HEADS = ((4 / 9, 0.561), (5 / 9, 0.662), (6 / 9, 0.754), (1.0, 1.0))
"""By share of heads kept, predicted from the attention's input; all: none is lost."""


@dataclass(frozen=True, slots=True)
class Acceptances:
    """Where acceptances come from, the most trusted first."""

    given: Mapping[str, float]
    """By kind of rung, or by what a rung says of itself, such as "self:kv=4096"; under "" that of the last rung's proposer."""
    calibration: Calibration | None
    relu: bool
    """Whether the model's neurons are ReLU's."""
    adapted: AdaptedSpec | None = None
    """What the model's config says of q4, where the model was adapted."""

    @classmethod
    def of(cls, asked: str | float | None, spec: ModelSpec, calibration: Calibration | None) -> Acceptances:
        """`asked`: such as 0.9, "0.9" or "self:kv=4096=0.92,draft=0.5". Raises UserError."""
        return cls(_parsed(asked), calibration, spec.activation == "relu", spec.adapted)

    def check(self, ladders: list[Ladder]) -> None:
        """Raise UserError where something was given for a rung that no ladder has."""
        for key in self.given:
            rungs = [rung for ladder in ladders for rung in ladder.lower]
            if not any(not key or _speaks_of(key, rung) for rung in rungs):
                have = ", ".join(dict.fromkeys(str(replace(rung, gamma=None)) for rung in rungs)) or "none below the last"
                raise UserError(f"acceptance={key or self.given[key]} is of no rung of the ladder: its rungs are {have}")

    def find(self, rung: Rung, above: Rung, *, top: bool) -> Acceptance:
        """Of a rung below the last, before the one `above` it. `top`: that is the last one."""
        keys = [key for key in self.given if (_speaks_of(key, rung) if key else top)]
        if keys:
            value = self.given[max(keys, key=lambda key: (bool(key), key.count("=")))]
            return Acceptance(value, value, value, "given")
        if rung.kind == "ngram":
            return NEVER
        if rung.kind == "draft":
            return _DRAFT
        parts = []
        if rung.light and not (above.light and rung.over_all_kv == above.over_all_kv):
            parts.append(self._of_weights(rung))
        if rung.kv is not None:
            parts.append(_of_view(rung))
        return parts[0] if len(parts) == 1 else _both(*parts)

    def _of_weights(self, rung: Rung) -> Acceptance:
        if self.calibration is not None and (found := _calibrated(rung.over_all_kv, self.calibration)) is not None:
            value, alone, how = found
            # The first draft of a run lies about half as far above the mean as that lies above acceptance by itself.
            most = min(1.0, value + max(0.0, value - alone) / 2)
            source = f"calibration {self.calibration.path}, {how}; {_LEAST}; most: of a run's first"
            return Acceptance(value, _worst(value), most, "measured", source)
        if rung.bits is not None:
            return _BITS[rung.bits]
        if (points := self._adapted_points(rung)) and rung.mlp is not None:
            value = _line(rung.mlp, ((0.0, 0.0), *points, *(() if points[-1][0] == 1 else ((1.0, 1.0),))))
            source = f"the model's config: by q4, when it was adapted; {_LEAST}"
            return Acceptance(value, _worst(value), value, "measured", source)
        value, told = 1.0, []
        if rung.mlp is not None:
            value *= self._of_neurons(rung)
            told.append(f"mlp={rung.mlp:g} by {rung.by or 'q4'}{' of a small ReLU model' if self._as_relu(rung) else ''}")
        if rung.heads is not None:
            value *= _line(rung.heads, _HEADS)
            told.append(f"{rung.heads:g} of the heads")
        if not told:
            return Acceptance(1.0, 1.0, 1.0, "assumed", "lm=hire gives the exact best tokens")
        source = f"{_EXPERIMENTS}: {' and '.join(told)}; {_LEAST}; most: half of what it lacks of 1"
        if self.adapted is not None and rung.mlp is not None and rung.cut != self.adapted.cut:
            source += f"; the model's config knows of cut={self.adapted.cut} alone"
        return Acceptance(value, _worst(value), (1 + value) / 2, "assumed", source)

    def _adapted_points(self, rung: Rung) -> tuple[tuple[float, float], ...]:
        """By density, where the config's are of rungs like this one: of its cut, and of a scorer that finds about what q4 does."""
        if self.adapted is None or rung.cut != self.adapted.cut or rung.heads is not None:
            return ()
        return self.adapted.acceptance if (rung.by or "q4") in ("q4", "q8", "oracle") else ()

    def _of_neurons(self, rung: Rung) -> float:
        assert rung.mlp is not None
        by = rung.by or "q4"
        if rung.over > 1 and by in ("q2", "q3", "q4"):
            by = "q4" if by == "q2" else "q8"  # so much do candidates that are ranked again gain there
        if self._as_relu(rung):
            return _RELU.get(by, _RELU["q4-ahead" if by.endswith("-ahead") else "q4"])
        points = zip(_DENSITIES, _BY_SCORER.get(by, _BY_SCORER["q4-ahead"]), strict=True)
        return _line(rung.mlp, ((0.0, 0.0), *points, (1.0, 1.0)))

    def _as_relu(self, rung: Rung) -> bool:
        """Whether the figure of the ReLU model is used: at its density and above."""
        return self.relu and rung.mlp is not None and rung.mlp >= _RELU_DENSITY


def _of_view(rung: Rung) -> Acceptance:
    if rung.view == "streaming":
        return _STREAMING
    if rung.view == "eviction":
        return _EVICTION
    assert rung.kv is not None
    if rung.kv >= _FEW_ENTRIES:
        return _RETRIEVAL
    return replace(_RETRIEVAL, low=_LEAST_OF_FEW, source=f"{_RETRIEVAL.source}, or 256 of 7,900 in docs/experiments.md")


def _both(weights: Acceptance, view: Acceptance) -> Acceptance:
    """Of a rung that reads a part of the weights and of the KV: as if it lost by each on its own."""
    origin: Origin = "assumed"
    source = f"product of {weights.value:.3f} ({weights.source}) and {view.value:.3f} ({view.source})"
    return Acceptance(weights.value * view.value, weights.low * view.low, weights.high * view.high, origin, source)


def _worst(value: float) -> float:
    """The least that the rule coupled accepts where 1 - TV is `value`: (1 - TV) / (1 + TV)."""
    return value / (2 - value)


def _calibrated(rung: Rung, calibration: Calibration) -> tuple[float, float, str] | None:
    """As a draft, by itself (the same in older calibrations, which told nothing else), and how it was found: measured, or on a straight
    line between the densities of the same scorer and cut that were."""
    quality = calibration.description.get("quality", {})

    def both(figures: Mapping[str, float]) -> tuple[float, float]:
        return float(figures.get("draft_acceptance", figures["acceptance"])), float(figures["acceptance"])

    how = "as a draft in runs of four" if all("draft_acceptance" in each for each in quality.values()) else "by itself"
    if (found := quality.get(str(rung))) is not None:
        return (*both(found), how)
    if rung.mlp is None or rung != Rung(kind="self", mlp=rung.mlp, by=rung.by, cut=rung.cut):
        return None
    points = {1.0: (1.0, 1.0)}
    for text, figures in quality.items():
        other = None if text == "dense" else Ladder.parse(text).rungs[0]
        if other is not None and other.mlp is not None and other == Rung(kind="self", mlp=other.mlp, by=rung.by, cut=rung.cut):
            points[other.mlp] = both(figures)
    if len(points) == 1 or rung.mlp < min(points):
        return None
    drafts, alone = (_line(rung.mlp, tuple((at, points[at][which]) for at in sorted(points))) for which in range(2))
    return drafts, alone, f"{how}, between the densities that it measured"


def _line(x: float, points: tuple[tuple[float, float], ...]) -> float:
    """Straight lines between points, in proportion below the first."""
    if x <= points[0][0]:
        return points[0][1] * x / points[0][0] if points[0][0] else points[0][1]
    at = min(max(1, bisect_left(points, (x, 0.0))), len(points) - 1)
    (x0, y0), (x1, y1) = points[at - 1 : at + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


_ITEMS = re.compile(r",(?=\s*(?:ngram|draft|self)\s*[:=])")


def _parsed(asked: str | float | None) -> dict[str, float]:
    if asked is None:
        return {}
    text = str(asked).strip()
    found: dict[str, float] = {}
    for item in _ITEMS.split(text):
        key, _, number = item.rpartition("=")
        key = key.strip()
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1 or (key not in ("", "ngram", "draft", "self") and not _is_rung(key)) or key in found:
            raise UserError(
                f"acceptance={text!r:.80} is not understood at {item.strip()!r:.60}: give a number from 0 to below 1, as in 0.9, "
                "or one for each rung, as in self:kv=4096=0.92,ngram=0.3"
            )
        found[key] = value
    return found


def _is_rung(key: str) -> bool:
    try:
        return Rung.parse(key).kind in ("ngram", "draft", "self")
    except UserError:
        return False


def _speaks_of(key: str, rung: Rung) -> bool:
    """Whether a rung is of that kind and has the settings that the key names."""
    kind, _, rest = key.partition(":")
    if not rest:
        return rung.kind == kind
    named, settings = Rung.parse(key), re.findall(r"(?:^|,)\s*([a-z_]+)\s*=", rest)
    return rung.kind == kind and all(getattr(rung, setting) == getattr(named, setting) for setting in settings)
