"""From a target to a density, and the quality that some rungs have on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rowcast.calibration.evaluate import drafts_of, laws_of
from rowcast.calibration.metrics import Laws
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.ladder.feasible import offered
from rowcast.runtime.ladder.presets import Circumstances, resolve
from rowcast.runtime.ladder.spec import Rung, ScorerName
from rowcast.runtime.protocols import WeightView
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.checks import check_rung
from rowcast.runtime.sparse.sizes import expected_bytes

DENSE = "dense"
"""The whole model, among rungs."""
STEP = 0.01
"""Of chosen densities."""
SHOWN = (0.25, 0.5, 0.7)
SHOWN_BY: tuple[ScorerName, ...] = ("oracle", "q4", "dejavu", "dejavu-ahead")
TOGETHER = 4
"""Rungs whose views, with their proxies, are in memory at the same time."""

Figures = dict[str, float]
"""perplexity and acceptance by itself, draft_acceptance as a rung, and bytes, the share of the dense model's that a token reads."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A model, its calibration and held-out windows [W, n], n >= 3."""

    banks: BankWeights
    calibration: Calibration
    windows: Tensor
    dtype: torch.dtype
    device: torch.device

    def quality(self, rungs: Sequence[Rung], say: Callable[[str], None] = lambda _: None) -> dict[str, Figures]:
        """Figures of each rung by its text, behind those of the dense model. `say` is told how far it is.

        Raises UserError for a rung that cannot be had.
        """
        for rung in rungs:
            check_rung(rung, self.banks.spec, self.calibration)
        found: dict[str, Figures] = {}
        for start in range(0, len(rungs), TOGETHER):
            say(f"quality of rung {start + 1} of {len(rungs)}")
            some = {str(rung): rung for rung in rungs[start : start + TOGETHER]}
            views = {name: build_view(self.banks, rung, self.calibration) for name, rung in some.items()}
            dense, laws = self._laws(views)
            drafts = self._drafts(views)
            found.setdefault(DENSE, _figures(dense, dense, 1.0))
            found |= {name: _figures(laws[name], drafts[name], self.bytes_share(rung)) for name, rung in some.items()}
        return found

    def draft_acceptance(self, rung: Rung) -> float:
        """As `quality` has it, and nothing else. Raises UserError for a rung that cannot be had."""
        check_rung(rung, self.banks.spec, self.calibration)
        return self._drafts({"it": build_view(self.banks, rung, self.calibration)})["it"].acceptance

    def layerwise(self, density: float, other: Calibration) -> tuple[float, float]:
        """The oracle's acceptance with the calibration's densities by layer, and with another's."""
        rung = Rung(kind="self", mlp=density, by="oracle")
        _, laws = self._laws(
            {"own": build_view(self.banks, rung, self.calibration), "other": build_view(self.banks, rung, other)}
        )
        return laws["own"].acceptance, laws["other"].acceptance

    def _laws(self, views: Mapping[str, WeightView]) -> tuple[Laws, dict[str, Laws]]:
        return laws_of(self.banks, views, self.windows.tolist(), device=self.device, dtype=self.dtype)

    def _drafts(self, views: Mapping[str, WeightView]) -> dict[str, Laws]:
        return drafts_of(self.banks, views, self.windows.tolist(), device=self.device, dtype=self.dtype)

    def bytes_share(self, rung: Rung) -> float:
        """Of the dense model's bytes, what a token reads."""
        spec, width = self.banks.spec, self.dtype.itemsize
        return expected_bytes(spec, rung, width, self.calibration) / expected_bytes(spec, Rung(kind="plain"), width, None)


def choose_density(judge: Judge, by: ScorerName, *, accept: float | None, bytes_share: float | None) -> float:
    """The smallest mean density, in steps of `STEP`, that reaches an acceptance, or the largest that reads at most a share of the
    bytes.

    1 where no smaller one reaches the acceptance; the smallest step where even that reads more.
    """
    low, high = 0, round(1 / STEP)  # of the acceptance: what is too low, and what is enough
    while high - low > 1:
        middle = (low + high) // 2
        rung = by_level(judge.calibration, Rung(kind="self", mlp=middle * STEP, by=by))
        if accept is not None:
            enough = judge.draft_acceptance(rung) >= accept
        else:
            assert bytes_share is not None
            enough = judge.bytes_share(rung) > bytes_share
        low, high = (low, middle) if enough else (middle, high)
    return round((high if accept is not None else max(1, low)) * STEP, 4)


def by_level(calibration: Calibration, rung: Rung) -> Rung:
    """`rung`, with the neurons above one level for all layers where the calibration has levels of its scorer and density."""
    assert rung.mlp is not None
    has = f"levels.{rung.by}" in calibration and calibration.densities[0] <= rung.mlp < 1
    return replace(rung, cut="threshold") if has else rung


def shown_rungs(judge: Judge) -> list[Rung]:
    """Some scorers at some densities and at the calibration's, above their levels where they have some, at the calibration's also each
    token's best, and what the presets make of the calibration.

    The LM head is whole where its rows are held in a library's layout only.
    """
    density: float = judge.calibration.description["density"]
    tops = [Rung(kind="self", mlp=share, by=by) for by in SHOWN_BY for share in sorted({*SHOWN, density})]
    levelled = [by_level(judge.calibration, top) for top in tops]
    rungs = list(dict.fromkeys([*levelled, *(top for top in tops if top.mlp == density)]))
    here = Circumstances(
        max_context=judge.banks.spec.max_context,
        kv_bytes_per_token=0,
        pass_bytes=lambda _: 1,
        calibrated=offered(judge.calibration),
    )
    for name in ("dejavu", "hire"):
        ladder, *_ = resolve(name, here, mode="approximate")
        had = [rung if judge.banks.outer.head_rows is not None else replace(rung, lm="full") for rung in ladder.rungs]
        rungs += [rung for rung in had if rung not in rungs]
    return rungs


def _figures(laws: Laws, drafts: Laws, share: float) -> Figures:
    shares = {"acceptance": laws.acceptance, "draft_acceptance": drafts.acceptance}
    return {"perplexity": laws.perplexity, **shares, "bytes": share}
