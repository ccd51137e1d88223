"""Ladders by name, and what a ladder leaves open: resolved once, with the reasons. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rowcast.errors import UserError
from rowcast.runtime.ladder.spec import Ladder, Rung, ScorerName

AUTO_KV = (256, 4096)
_AUTO_KV_SHARE = 8

DENSITY = 0.5
"""Share of the neurons where neither the user nor a calibration nor the model names one."""
_HEADS = 0.67
"""Of the query heads, `dejavu`."""
OVER = 1.5
"""`hire`, where no calibration says how many candidates reach its recall, or that would take more than `_MOST_OVER`."""
_MOST_OVER = 2.0
_CLEARLY_FEWER = 0.8
"""Of the bytes that a pass of the last rung reads, what a sparse rung of `auto` reads at most."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration offers."""

    scorers: tuple[ScorerName, ...] = ()
    """What it knows of, the best first."""
    density: float | None = None
    """The share of neurons that its target asks for."""
    heads: bool = False
    """Whether it tells heads apart."""
    over: float | None = None
    """Candidates over kept neurons with which q4 reaches its recall, at about its density."""
    levels: tuple[ScorerName, ...] = ()
    """Scorers that it has common levels of, for all layers."""
    predictors: bool = True
    """Whether it has those of `dejavu`: what `rowcast adapt` leaves has none."""
    least: float = 0.0
    """The least share of neurons that a level is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What presets and `auto` look at."""

    max_context: int
    kv_bytes_per_token: int
    pass_bytes: Callable[[Rung], int]
    """Weights that a pass of a rung self or plain reads, as expected."""
    calibrated: Calibrated | None = None
    adapted: float | None = None
    """The density that the model was adapted to, for where no calibration names one."""


def resolve(
    ladder: str | Ladder,
    here: Circumstances,
    *,
    mode: str = "exact",
    draft: str | None = None,
    kv_budget: int | None = None,
    density: float | None = None,
) -> tuple[Ladder, bool, list[str]]:
    """The ladder that a preset's name, a text or a Ladder means, whether it is `auto`, and the reasons for automatic choices.

    `draft`: a model for the rungs draft that name none, or "ngram" for an n-gram rung in their place. `kv_budget`: KV entries of the
    rung self of `triforce` and `auto`. `density`: share of the neurons of the sparse rung of `dejavu`, `hire` and `auto`. Under `auto`
    any rung may be left out at run time; the ladder is all that there is. Raises UserError where `draft`, `kv_budget` or `density` has
    no place, and where the ladder's last rung is not one of `mode`.
    """
    reasons: list[str] = []
    if density is not None and ladder not in ("auto", "dejavu", "hire"):
        raise UserError(
            f"density={density} has no place in the ladder {str(ladder)!r:.80}; leave it out, write self:mlp=... in the ladder, or use "
            "dejavu, hire or auto"
        )
    if kv_budget is not None and ladder not in ("auto", "triforce"):
        raise UserError(
            f"kv_budget={kv_budget} has no place in the ladder {str(ladder)!r:.80}; leave it out, write self:kv=... in the ladder, or "
            "use auto or triforce"
        )
    if ladder == "auto":
        found = _auto_ladder(here, draft, kv_budget, density, reasons)
    elif ladder in ("dejavu", "hire"):
        found = _sparse_preset(str(ladder), here, mode, density, reasons)
    elif ladder == "triforce":
        kv = kv_budget if kv_budget is not None else kv_for(here.max_context)
        if kv_budget is None:
            low, high = AUTO_KV
            reasons.append(f"rung self:kv={kv}: an eighth of {here.max_context} tokens of context, within {low} and {high}")
        found = Ladder((Rung(kind="draft"), Rung(kind="self", kv=kv), Rung(kind="plain")))
    elif isinstance(ladder, Ladder):
        found = ladder
    else:
        found = Ladder.parse("ngram / plain" if ladder.strip() == "ngram" else ladder)
    if ladder != "auto":
        found = _with_draft(found, draft)
    found = Ladder(tuple(_with_scorer(rung, here.calibrated, reasons) for rung in found.rungs))
    check_mode(found, mode, "auto" if ladder == "auto" else str(found))
    return found, ladder == "auto", reasons


def check_mode(ladder: Ladder, mode: str, name: str) -> None:
    """Raise UserError where the last rung is not one of `mode`; `name`: of the ladder, as the user knows it."""
    if ladder.approximate and mode != "approximate":
        last = "sparse" if ladder.rungs[-1].sparse else "low-bit"
        raise UserError(
            f"the ladder {name!r:.80} ends in a {last} rung, so that its output is not the model's; use mode=approximate, or end it in "
            "/ plain"
        )
    if not ladder.approximate and mode == "approximate":
        raise UserError(
            f"mode=approximate takes a ladder whose last rung is sparse or low-bit, and {name!r:.80} ends in plain; use hire, dejavu, "
            "self:mlp=0.5 or self:bits=4, or mode=exact"
        )


def _sparse_preset(name: str, here: Circumstances, mode: str, density: float | None, reasons: list[str]) -> Ladder:
    calibrated = here.calibrated
    if name == "dejavu" and (calibrated is None or not calibrated.predictors):
        lacking = "" if calibrated is None else " with predictors"
        raise UserError(
            f"the ladder dejavu needs a calibration{lacking}; make one with rowcast calibrate and give calibration=DIR, or use hire"
        )
    mlp = _density(density, here, reasons)
    if name == "hire":
        rung = hire_rung(mlp, calibrated, reasons)
    else:
        heads = _HEADS if calibrated is not None and calibrated.heads else None
        if heads is None:
            reasons.append("ladder dejavu with all heads: the calibration does not tell them apart")
        rung = Rung(kind="self", mlp=mlp, by="dejavu", heads=heads)
    return Ladder((rung,) if mode == "approximate" else (rung, Rung(kind="plain")))


def _density(density: float | None, here: Circumstances, reasons: list[str]) -> float:
    calibrated = here.calibrated
    if density is not None:
        return density
    if calibrated is not None and calibrated.density is not None:
        reasons.append(f"mlp={calibrated.density}: the calibration's density")
        return calibrated.density
    if here.adapted is not None:
        reasons.append(f"mlp={here.adapted}: the density that the model was adapted to")
        return here.adapted
    reasons.append(f"mlp={DENSITY}: no density was given")
    return DENSITY


def hire_rung(mlp: float, calibrated: Calibrated | None, reasons: list[str]) -> Rung:
    """The sparse rung of `hire`; `reasons` gets more of them. Above levels no candidates are ranked again: levels gain more."""
    rung = with_levels(Rung(kind="self", mlp=mlp, by="q4", lm="hire"), calibrated, reasons)
    if rung.cut == "threshold":
        return rung
    over = OVER
    if calibrated is not None and calibrated.over is not None:
        known = 1 <= calibrated.over <= _MOST_OVER
        over = calibrated.over if known else OVER
        reached = f"the calibration's recall takes {calibrated.over}"
        reasons.append(f"over={over}: {reached}" + ("" if known else f", and {_MOST_OVER} is the most"))
    return replace(rung, over=over)


def sparse_rung(mlp: float, calibrated: Calibrated | None, reasons: list[str]) -> Rung:
    """A share of the neurons, chosen as is known to be best; `reasons` gets more of them."""
    return with_levels(_with_scorer(Rung(kind="self", mlp=mlp), calibrated, reasons), calibrated, reasons)


def _with_scorer(rung: Rung, calibrated: Calibrated | None, reasons: list[str]) -> Rung:
    """Name what finds the neurons where the rung does not."""
    if rung.mlp is None or rung.by is not None:
        return rung
    known = calibrated is not None and bool(calibrated.scorers)
    found = replace(rung, by=calibrated.scorers[0] if calibrated is not None and known else "q4")
    reasons.append(f"by={found.by}: {'the best that the calibration measured' if known else 'needs no calibration'}")
    return found


def with_levels(rung: Rung, calibrated: Calibrated | None, reasons: list[str]) -> Rung:
    """Choose by the calibration's levels where it has some of the scorer for the rung's density."""
    if calibrated is None or rung.by not in calibrated.levels or rung.over > 1:
        return rung
    assert rung.mlp is not None
    if not calibrated.least <= rung.mlp < 1:
        return rung
    reasons.append(f"cut=threshold: the calibration has levels of {rung.by} that are common to all layers")
    return replace(rung, cut="threshold")


def _with_draft(ladder: Ladder, draft: str | None) -> Ladder:
    """Fill the rungs draft that name no model."""
    empty = [i for i, rung in enumerate(ladder.rungs) if rung.kind == "draft" and rung.model is None]
    if draft is None:
        if empty:
            raise UserError(
                f"the ladder {str(ladder)!r:.80} has a rung draft without a model; give draft=MODEL, or write draft:model=MODEL in it"
            )
        return ladder
    if draft == "ngram":
        if empty == [0]:
            return Ladder((Rung(kind="ngram"), *ladder.rungs[1:]))
        if ladder.rungs[0].kind == "ngram" and not empty:
            return ladder
    elif empty:
        return Ladder(tuple(replace(rung, model=draft) if i in empty else rung for i, rung in enumerate(ladder.rungs)))
    fix = "ngram" if draft == "ngram" else "triforce"
    raise UserError(
        f"draft={draft!r:.80} has no place in the ladder {str(ladder)!r:.80}; leave it out, or use the ladder auto or {fix}"
    )


def _auto_ladder(
    here: Circumstances, draft: str | None, kv_budget: int | None, density: float | None, reasons: list[str]
) -> Ladder:
    plain = Rung(kind="plain")
    whole = here.pass_bytes(plain)
    rungs = [Rung(kind="ngram")]
    reasons.append("rung ngram: it costs next to nothing")
    if draft is None or draft == "ngram":
        reasons.append("no rung draft: no draft model was given")
    else:
        rungs.append(Rung(kind="draft", model=draft))
        reasons.append("rung draft: a draft model was given")
    if density is not None or here.calibrated is not None or here.adapted is not None:
        rung = sparse_rung(_density(density, here, reasons), here.calibrated, reasons)
        share = here.pass_bytes(rung) / max(whole, 1)
        told = f"it reads {share:.2f} of the weights that a plain pass reads"
        if density is not None or share <= _CLEARLY_FEWER:
            rungs.append(rung)
            reasons.append(f"rung {rung}: {told}")
        else:
            reasons.append(f"no rung {rung}: {told}")
    share = here.max_context * here.kv_bytes_per_token / max(whole, 1)
    told = f"KV of {here.max_context} tokens is {share:.2f} of the weights that a pass reads"
    if kv_budget is not None:
        rungs.append(Rung(kind="self", kv=kv_budget))
        reasons.append(f"rung self:kv={kv_budget}: a KV budget was given")
    elif share >= 0.5 and here.max_context >= 2 * AUTO_KV[0]:
        rungs.append(Rung(kind="self", kv=kv_for(here.max_context)))
        reasons.append(f"rung {rungs[-1]}: {told}")
    else:
        reasons.append(f"no rung self over a part of the KV: {told}")
    return Ladder((*rungs, plain))


def kv_for(max_context: int) -> int:
    """An eighth of the context in whole 64s, within `AUTO_KV`."""
    low, high = AUTO_KV
    return min(max(max_context // _AUTO_KV_SHARE // 64 * 64, low), high)
