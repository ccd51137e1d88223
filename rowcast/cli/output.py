"""What the verbs print: text on standard output, statistics on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rowcast.placement.report import PlanReport
    from rowcast.runtime.outputs import RequestOutput, RequestStats, StreamChunk

SHOWN_POSITIONS = 8
"""Acceptance by position goes on for as long as the longest proposal; `--json` shows all of it."""


def print_json(value: object) -> None:
    """One object on one line of standard output."""
    print(json.dumps(value), flush=True)


def print_statistics(output: RequestOutput) -> None:
    """On standard error: one line and, where a rung drafted or tried to or read a part of the weights, another that says what each
    rung did and took."""
    stats = output.metrics
    parts = [f"{stats.prompt_tokens} prompt tokens", f"{stats.generated_tokens} generated"]
    if stats.ttft_s is not None:
        parts.append(f"{stats.ttft_s:.2f} s to the first")
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    rounds = [f"{stats.tokens_per_round:.2f} tokens a round"] if stats.rounds else []
    ladder = [f"ladder {stats.ladder}"] if stats.ladder.lower or stats.ladder.approximate else []
    ran = {name: counts for name, counts in stats.rungs.items() if counts.tokens or counts.proposed}
    sparse = any(counts.neurons_of or counts.heads_of for counts in ran.values())
    if ran.keys().isdisjoint(stats.ladder.names[:-1]) and not sparse:
        _print_bracketed([", ".join(parts + rounds), *ladder])
        return
    _print_bracketed([", ".join(parts), *ladder])
    _print_bracketed(rounds + [_rung(name, stats) for name in ran])


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


def with_plan(value: dict[str, Any], report: PlanReport | None) -> dict[str, Any]:
    """A request's object with what the plan foretold, and what was measured up to its end, in `stats`; as it is without a report."""
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
