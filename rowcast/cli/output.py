"""What the verbs print: text on standard output, statistics on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rowcast.placement.plan import Plan
    from rowcast.placement.report import PlanReport
    from rowcast.runtime.outputs import RequestOutput, RequestStats, StreamChunk
    from rowcast.runtime.step import Moved

SHOWN_POSITIONS = 8
"""Acceptance by position goes on for as long as the longest proposal; `--json` shows all of it."""


def print_json(value: object) -> None:
    """One object on one line of standard output."""
    print(json.dumps(value), flush=True)


def print_placement(plan: Plan) -> None:
    """On standard error, which calibration is used that nobody gave, and where parts of the model lie; nothing where all of it lies
    next to the compute."""
    from rowcast.runtime.plan_notes import OWN_CALIBRATION

    for note in plan.notes:
        if note.startswith(OWN_CALIBRATION):
            _print_bracketed([note])
    if told := plan.places_text():
        _print_bracketed([f"placement: {told}"])


def print_statistics(output: RequestOutput) -> None:
    """On standard error: one line; where a rung drafted or tried to or read a part of the weights, another that says what each rung did
    and took; where parts lie elsewhere, another that says what of them was moved."""
    _print_request(output.metrics)
    if output.metrics.moved is not None:
        _print_bracketed([_moved(output.metrics.moved)])


def _print_request(stats: RequestStats) -> None:
    parts = [f"{stats.prompt_tokens} prompt tokens", f"{stats.generated_tokens} generated"]
    if stats.ttft_s is not None:
        parts.append(f"{stats.ttft_s:.2f} s to the first")
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    rounds = [f"{stats.tokens_per_round:.2f} tokens a round"] if stats.rounds else []
    ladder = [f"ladder {stats.ladder}", *_left_out(stats)] if stats.ladder.lower or stats.ladder.approximate else []
    ran = {name: counts for name, counts in stats.rungs.items() if counts.tokens or counts.proposed}
    sparse = any(counts.neurons_of or counts.heads_of for counts in ran.values())
    if ran.keys().isdisjoint(stats.ladder.names[:-1]) and not sparse:
        _print_bracketed([", ".join(parts + rounds), *ladder])
        return
    _print_bracketed([", ".join(parts), *ladder])
    _print_bracketed(rounds + [_rung(name, stats) for name in ran])


def _left_out(stats: RequestStats) -> list[str]:
    """Such as "left out, as that would not pay: self": rungs that the control used in no round, by why. Nothing of pinned ones, of
    n-grams that were looked up in vain, and where rounds are so few that all were plain to be timed."""
    from rowcast.runtime.ladder.control import PLAIN_ROUNDS

    if stats.rounds <= PLAIN_ROUNDS:
        return []
    by_reason: dict[str, list[str]] = {}
    names = stats.ladder.names if stats.names is None else stats.names
    for name, rung in zip(names, stats.ladder.lower, strict=False):
        counts = stats.rungs.get(name)
        if rung.gamma is not None or (counts is not None and (counts.tokens or counts.proposed or counts.seconds)):
            continue
        if stats.prompt_tokens + stats.generated_tokens < rung.pays_from:
            reason = f"below {rung.pays_from} tokens of context"
        else:
            reason = "as nothing matched or that would not pay" if rung.kind == "ngram" else "as that would not pay"
        by_reason.setdefault(reason, []).append(name)
    return [f"left out, {reason}: {', '.join(which)}" for reason, which in by_reason.items()]


def _moved(moved: Moved) -> str:
    """Such as "moved 3.1 GiB of weights, 120 of 500 rows (.76 hit), 20.0 MiB of KV; 0.41 s stalled": what there was of it."""
    from rowcast.placement.units import format_bytes

    told = [f"{format_bytes(moved.weight_bytes)} of weights"] if moved.weight_bytes else []
    if moved.rows_wanted:
        hit = f"{moved.rows_hit / moved.rows_wanted:.2f}".removeprefix("0")
        told.append(f"{moved.rows_moved} of {moved.rows_wanted} rows ({hit} hit, {format_bytes(moved.row_bytes)})")
    told += [f"{format_bytes(moved.kv_bytes)} of KV"] if moved.kv_bytes else []
    told += [f"{format_bytes(moved.kv_out_bytes)} of KV out"] if moved.kv_out_bytes else []
    told += [f"{format_bytes(moved.disk_bytes)} from disk"] if moved.disk_bytes else []
    return f"moved {', '.join(told) or 'nothing'}; {moved.stalled_s:.2f} s stalled"


def _rung(name: str, stats: RequestStats) -> str:
    """Such as "self: 0.90 of 20 accepted (.95 .85), 10 refreshes, 0.08 s": what was judged, as a whole and by position; then what
    it chose of the KV, and of the weights."""
    counts, told = stats.rungs[name], []
    if counts.judged:
        shares = [f"{share:.2f}".removeprefix("0") for share in stats.acceptance_by_position[name]]
        shown = " ".join(shares[:SHOWN_POSITIONS] + ["..."] * (len(shares) > SHOWN_POSITIONS))
        told.append(f"{stats.acceptance[name]:.2f} of {sum(counts.judged)} accepted ({shown})")
    if counts.refreshes:
        told.append(f"{counts.refreshes} refreshes")
    if counts.neurons < counts.neurons_of:
        told.append(f"{stats.density[name]:.2f} of the neurons")
    if counts.heads < counts.heads_of:
        told.append(f"{stats.head_density[name]:.2f} of the heads")
    told += [f"{count} {what}" for what, count in (("overflows", counts.overflows), ("fallbacks", counts.fallbacks)) if count]
    return f"{name}: {', '.join([*told, f'{counts.seconds:.2f} s'])}"


def _print_bracketed(parts: Iterable[str]) -> None:
    print(f"[{'; '.join(parts)}]", file=sys.stderr)


def with_plan(value: dict[str, Any], plan: Plan, report: PlanReport | None) -> dict[str, Any]:
    """A request's object with, in `stats`, where parts lie, what the plan foretold and what was measured up to its end; as it is where
    all lies next to the compute and there is no report."""
    if places := plan.places():
        value["stats"]["placement"] = places
    if report is not None:
        value["stats"]["plan"] = report.to_json()
    return value


def print_plan_report(report: PlanReport | None) -> None:
    """On standard error, what a plan foretold beside what was measured; nothing without a report."""
    if report is not None:
        from rowcast.cli.plan_table import print_report

        print_report(report, sys.stderr)


def print_stream(chunks: Iterable[StreamChunk]) -> str:
    """Text as it comes, then a line break and the statistics. Returns the whole text."""
    text = ""
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        text += chunk.text
        if chunk.output is not None:
            print(flush=True)
            print_statistics(chunk.output)
    return text


def print_outputs(outputs: Iterable[RequestOutput]) -> None:
    """Texts as they come, each under its prompt's number and, where a prompt has several samples, the sample's."""
    for number, output in enumerate(outputs, start=1):
        for completion in output.outputs:
            sample = f".{completion.index + 1}" if len(output.outputs) > 1 else ""
            print(f"==> {number}{sample} <==\n{completion.text}\n", flush=True)
        print_statistics(output)
