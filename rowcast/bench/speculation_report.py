"""The report of `rowcast bench speculation` for people, line by line. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any


def print_report(report: Mapping[str, Any]) -> None:
    """On standard error. With simulated acceptance every line says so."""
    label = f"[{report['label']}] " if "label" in report else ""
    for line in lines(report):
        print(label + line, file=sys.stderr)


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What was run, then a paragraph for each ladder, then the peer."""
    yield (
        f"{report['shape'] or report['model']}, {report['dtype']} on {report['device']}, {report['threads']} threads, batch "
        f"{report['batch']}, {report['prompt_tokens']} prompt tokens each, {report['max_tokens']} new, temperature "
        f"{report['temperature']:g}, {report['verification']}; medians of {report['repeat']}; "
        f"{report['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    for name, entry in report["ladders"].items():
        yield from _ladder(name, entry)
    if (peer := report.get("transformers")) is not None:
        yield (
            f"Transformers: {_ms(peer['s_per_token'])} a token by assisted generation, {peer['speedup']:.2f}x its plain "
            f"{_ms(peer['plain_s_per_token'])} (second half {_ms(peer['later_s_per_token'])}, {peer['later_speedup']:.2f}x); "
            f"{peer['tokens_per_round']:.2f} tokens a round; {_sameness(peer)}"
        )


def _ladder(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    resolved = f" = {entry['ladder']}" if entry["ladder"] != name else ""
    yield (
        f"{name}{resolved}: {_ms(entry['s_per_token'])} a token, {entry['speedup']:.2f}x plain (second half "
        f"{_ms(entry['later_s_per_token'])}, {entry['later_speedup']:.2f}x); {entry['tokens_per_round']:.2f} tokens a round; floor "
        f"{_ms(entry['floor_s_per_token'])} for {entry['bytes_per_token'] / 2**20:.0f} MiB, reached {entry['floor_reached']:.0%}; "
        f"prefill {entry['prefill_s']:.2f} s" + (f"; {_sameness(entry)}" if "identical" in entry else "")
    )
    for rung, seconds in entry["time_s_per_token"].items():
        parts = [f"{_ms(seconds)} a token"]
        if run := entry["run_per_token"][rung]:
            parts.append(f"{run:.2f} tokens run for each written")
        if rung in entry["acceptance"]:
            positions = " ".join(f"{share:.2f}" for share in entry["acceptance_by_position"][rung])
            parts.append(f"{entry['acceptance'][rung]:.3f} accepted, by position {positions}")
        elif not run:
            parts.append("nothing proposed")
        if rung in entry["refreshes"]:
            parts.append(f"{entry['refreshes'][rung]} refreshes")
        yield f"    {rung}: {', '.join(parts)}"
    for rung in entry["not_used"]:
        yield f"    {rung}: not used"
    for found in entry.get("differences", ()):
        yield (
            f"    differs from plain in round {found['round']}, prompt {found['prompt']}, at token {found['position']}, where plain's "
            f"token is ahead by {found['gap']:.2g}"
        )


def _sameness(entry: Mapping[str, Any]) -> str:
    return "output identical to plain's" if entry["identical"] else "output not plain's"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
