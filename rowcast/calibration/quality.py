"""What `rowcast eval` measures: sparse and low-bit rungs of a model on texts, each beside the dense model, the sparse ones beside the
oracle at the same density.

oracle - dense is the price of sparsity, predicted - oracle the price of prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rowcast.calibration.evaluate import evaluate
from rowcast.calibration.progress import CalibrationProgress
from rowcast.calibration.tasks import accuracy, make_tasks
from rowcast.calibration.text import Encoder, read_text, tokens_before
from rowcast.errors import UserError
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.device import DTYPES, choose_device, choose_dtype
from rowcast.runtime.ladder.feasible import offered
from rowcast.runtime.ladder.presets import DENSITY, Circumstances, resolve, with_levels
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.lowbit_weights import LowBitWeights
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.checks import check_rung
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import load_tokenizer

LEAST_WINDOW, WINDOW = 16, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to measure, as the command line has it."""

    ladder: str | None = None
    """Its sparse and low-bit rungs. Else every selector at every density and share of heads, and by the calibration's levels, too."""
    selectors: Sequence[str] = ()
    """None: q4, or what the calibration has fitted."""
    densities: Sequence[float] = ()
    heads: Sequence[float] = ()
    over: float = 1.0
    tokens: int = 8192
    """Of each text, at most."""
    window: int | None = None
    """None: 1,024, or the model's context."""
    tasks: bool = False
    items: int = 50
    """Of each kind of task."""
    sparse_prompt: bool = False
    """Run the tasks with sparse prompts, too."""
    seed: int = 0
    layers: bool = False
    """Report every layer."""


def measure_quality(
    model: str,
    texts: Sequence[Path],
    wanted: Wanted,
    *,
    calibration: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    progress: bool | None = None,
) -> dict[str, Any]:
    """The report of `rowcast eval`, ready for JSON. Raises UserError for what cannot be measured."""
    checkpoint = open_checkpoint(model)
    spec = spec_from_config(checkpoint.config)
    learnt = Calibration.find(calibration, checkpoint.path, checkpoint.source.fingerprint())
    rungs = light_rungs(wanted, spec, learnt)
    encoder = load_tokenizer(checkpoint)
    contents = {str(path): read_text(path)[0] for path in texts}
    if wanted.window is not None and wanted.window > spec.max_context:
        raise UserError(f"--window {wanted.window} is longer than the model's context of {spec.max_context}: lower it")
    window = wanted.window or min(WINDOW, spec.max_context)
    windows = {name: cut(text, encoder, wanted.tokens, window, name) for name, text in contents.items()}
    tasks = {}
    if wanted.tasks:
        text = "\n".join(contents.values())
        tasks = make_tasks(text, encoder, items=wanted.items, context=spec.max_context, seed=wanted.seed)
    where, _ = choose_device(device)
    kind, _ = choose_dtype(dtype, checkpoint.stored_dtype, where)
    banks = BankWeights(spec, checkpoint.source, SoloComm(), dtype=DTYPES[kind], device=where)
    passes = 2 * (len(rungs) + 1) * sum(map(len, windows.values()))
    found: dict[str, Any] = {"model": model, "dtype": kind, "device": str(where), "window": window, "texts": {}}
    if learnt is not None and calibration is None and any(rung.sparse for rung in rungs.values()):
        found["own_calibration"] = str(learnt.path)
    views = {
        name: build_view(banks, rung, learnt)
        if rung.bits is None
        else LowBitWeights.beside(banks, checkpoint.source, SoloComm(), rung.bits, dtype=DTYPES[kind], device=where)
        for name, rung in rungs.items()
    }
    with CalibrationProgress(passes, progress, "measuring") as bar:
        for name, ids in windows.items():
            bar.say(name)
            one = evaluate(banks, views, ids, device=where, dtype=DTYPES[kind], advance=lambda: bar.advance(1))
            found["texts"][name] = with_prices(one.to_json(wanted.layers), rungs)
    if tasks:
        decoders = {name: Decoder(view, SoloComm(), where) for name, view in views.items()}
        decoders = {"dense": Decoder(banks, SoloComm(), where), **decoders}
        found["tasks"] = {"items": {task: len(items) for task, items in tasks.items()}}
        for prompt in ("dense", "sparse")[: 1 + wanted.sparse_prompt]:
            found["tasks"][f"{prompt}_prompt"] = {
                name: accuracy(decoder, tasks, dtype=DTYPES[kind], sparse_prompt=prompt == "sparse")
                for name, decoder in decoders.items()
            }
    return found


def light_rungs(wanted: Wanted, spec: ModelSpec, calibration: Calibration | None) -> dict[str, Rung]:
    """What to measure, by name, the oracle of a density before those that it bounds. KV is full everywhere: this is about weights.

    Raises UserError for a ladder without a sparse or low-bit rung, and for one that the model or the calibration has no selector for.
    """
    found: dict[str, Rung] = {}
    for rung in _asked(wanted, spec, calibration):
        check_rung(rung, spec, calibration)
        for one in (oracle_of(rung), rung):
            found[_name(one)] = one
    return found


def oracle_of(rung: Rung) -> Rung:
    """The same rung with exact choice of neurons."""
    return rung if rung.mlp is None else replace(rung, by="oracle", over=1.0, cut="top", common=None, group=1)


def cut(text: str, encoder: Encoder, tokens: int, window: int, name: str) -> list[list[int]]:
    """At most `tokens` tokens of a text as windows, evenly spread over it; one shorter window where it has no more. Each begins with
    what the encoder puts before a prompt.

    Raises UserError for fewer than `LEAST_WINDOW` tokens.
    """
    begins, ids = tokens_before(text, encoder), encoder.encode(text, add_special_tokens=False)
    if len(ids) < LEAST_WINDOW:
        raise UserError(f"the text {name} has {len(ids)} tokens, at least {LEAST_WINDOW} are needed: give a longer text")
    body = window - len(begins)
    whole = max(1, len(ids) // body)
    count = min(whole, max(1, tokens // window))
    starts = (whole * i // count * body for i in range(count))
    return [[*begins, *ids[start : start + min(window, tokens) - len(begins)]] for start in starts]


def with_prices(report: dict[str, Any], rungs: Mapping[str, Rung]) -> dict[str, Any]:
    """Add what prediction costs: differences to the oracle at the same density."""
    views = report["views"]
    for name, rung in rungs.items():
        oracle = views[_name(oracle_of(rung))]
        views[name]["rung"] = str(rung)
        if views[name] is not oracle:
            for figure in ("perplexity", "acceptance"):
                views[name][f"{figure}_over_oracle"] = views[name][figure] - oracle[figure]
    return report


def _asked(wanted: Wanted, spec: ModelSpec, calibration: Calibration | None) -> Iterator[Rung]:
    calibrated = None if calibration is None else offered(calibration)
    adapted = None if spec.adapted is None else spec.adapted.density
    here = Circumstances(
        max_context=spec.max_context, kv_bytes_per_token=0, pass_bytes=lambda _: 0, calibrated=calibrated, adapted=adapted
    )
    if wanted.ladder is not None:
        if wanted.selectors or wanted.densities or wanted.heads:
            raise UserError(f"the ladder {wanted.ladder!r:.80} names its own density: leave selector, density and heads out")
        if wanted.over != 1:
            raise UserError(
                f"--over {wanted.over:g} has no place beside a ladder: leave it out, or write over={wanted.over:g} in a rung"
            )
        ladders: list[str | Ladder] = [wanted.ladder]
    else:
        if wanted.over != 1 and wanted.selectors and set(wanted.selectors) == {"oracle"}:
            raise UserError(f"--over {wanted.over:g} ranks candidates again, which the oracle has no need of: leave it out")
        densities = wanted.densities or ((None,) if wanted.heads else (adapted or DENSITY,))
        grid = product(densities, wanted.selectors or (None,), wanted.heads or (None,))
        ladders = [Ladder((_rung(mlp, by, wanted.over, heads),)) for mlp, by, heads in grid]
    for ladder in ladders:
        preset = isinstance(ladder, str) and ladder in ("dejavu", "hire", "auto")
        parsed = ladder if isinstance(ladder, Ladder) else resolve(ladder, here)[0] if preset else Ladder.parse(ladder)
        light = [rung for rung in parsed.rungs if rung.light]
        if not light:
            raise UserError(
                f"the ladder {str(ladder)!r:.80} has no sparse rung, and none with bits: name one, as in self:mlp=0.5,by=q4 / plain"
            )
        for rung in light:
            # One at a time: what other rungs lack, such as a draft's model, is not needed here.
            resolved, _, _ = resolve(Ladder((rung.over_all_kv,)), here, mode="approximate")
            for one in resolved.rungs:
                yield one
                if wanted.ladder is None:
                    yield with_levels(one, calibrated, [])


def _rung(mlp: float | None, by: str | None, over: float, heads: float | None) -> Rung:
    if mlp is None and by is not None:
        raise UserError(f"the selector {by} chooses neurons, and no density was given for them: add a density such as 0.5")
    return Rung(kind="self", mlp=mlp, by=by, over=over if by != "oracle" else 1.0, heads=heads)  # type: ignore[arg-type]


def _name(rung: Rung) -> str:
    return str(rung).removeprefix("self:")
