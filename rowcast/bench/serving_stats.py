"""What a server's answers come to: latencies as mean, median and 99th percentile, throughput, goodput. vLLM's names; torch-free.

TTFT: to the first token. TPOT: time per output token after the first, by request. ITL: between chunks of a stream. E2EL: to the end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rowcast.bench.serving_client import Outcome
from rowcast.errors import UserError

LATENCIES = ("ttft", "tpot", "itl", "e2el")

Objectives = Mapping[str, float]
"""Seconds that a request may take, by one of LATENCIES; for `itl` the mean of its own."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (NumPy's default). `values` may not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parse_objectives(text: str) -> dict[str, float]:
    """From "ttft=500,tpot=50": milliseconds, or with a unit, as in "ttft=0.5s". Raises UserError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)?\s*", part)
        if match is None or match[1] not in LATENCIES:
            names = ", ".join(LATENCIES)
            raise UserError(f"--slo has {part.strip()!r:.40} but takes NAME=TIME with {names}, as in ttft=500ms,tpot=0.05s")
        found[match[1]] = float(match[2]) * (1.0 if match[3] == "s" else 1e-3)
    return found


def meets(outcome: Outcome, objectives: Objectives) -> bool:
    """Whether a request was finished within all of them. One without a latency, such as the TPOT of a lone token, keeps it."""
    if outcome.error is not None:
        return False
    gaps = outcome.itl_s
    took = {
        "ttft": outcome.ttft_s,
        "tpot": outcome.tpot_s,
        "itl": sum(gaps) / len(gaps) if gaps else None,
        "e2el": outcome.e2el_s,
    }
    return all((took[name] or 0.0) <= limit_s for name, limit_s in objectives.items())


def latencies(outcomes: Iterable[Outcome]) -> dict[str, float | None]:
    """mean_ttft_ms, median_ttft_ms, p99_ttft_ms and so on, over those that were finished; None where there are none."""
    done = [each for each in outcomes if each.error is None]
    samples: dict[str, list[float]] = {
        "ttft": [each.ttft_s for each in done if each.ttft_s is not None],
        "tpot": [each.tpot_s for each in done if each.tpot_s is not None],
        "itl": [gap for each in done for gap in each.itl_s],
        "e2el": [each.e2el_s for each in done],
    }
    found: dict[str, float | None] = {}
    for name, values in samples.items():
        found[f"mean_{name}_ms"] = 1e3 * sum(values) / len(values) if values else None
        found[f"median_{name}_ms"] = 1e3 * percentile(values, 50) if values else None
        found[f"p99_{name}_ms"] = 1e3 * percentile(values, 99) if values else None
    return found


def summarise(outcomes: Sequence[Outcome], objectives: Objectives | None = None) -> dict[str, Any]:
    """Counts, rates and latencies of a run. Its duration goes from the first arrival to the last end.

    Tokens count where their request was finished, by the server's count. Errors are counted by status or code; `retries` are tries
    beyond each request's first. `p99_send_lag_ms` is how late the client itself was, of requests that had not to wait for room.
    """
    done = [each for each in outcomes if each.error is None]
    start_s = min(each.arrived_s for each in outcomes)
    duration_s = max(max(each.end_s for each in outcomes) - start_s, 1e-9)
    input_tokens = sum((each.usage or {}).get("prompt_tokens", each.planned.prompt_tokens) for each in done)
    output_tokens = sum(each.output_tokens for each in done)
    lags = [each.sent_s - each.arrived_s for each in outcomes if each.sent_s is not None]
    report: dict[str, Any] = {
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "errors": dict(sorted(Counter(each.error for each in outcomes if each.error is not None).items())),
        "retries": sum(each.tries - 1 for each in outcomes),
        "duration": duration_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration_s,
        "request_goodput": None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "p99_send_lag_ms": 1e3 * percentile(lags, 99) if lags else None,
    }
    if objectives:
        report["request_goodput"] = sum(meets(each, objectives) for each in outcomes) / duration_s
    report |= latencies(outcomes)
    if any(each.planned.long for each in outcomes):
        report["short"] = latencies(each for each in outcomes if not each.planned.long)
        report["long"] = latencies(each for each in outcomes if each.planned.long)
    return report
