"""For `report.py`: tables and sentences of results that have no figures and claims (`_figures.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from report_figures import NONE, Result, is_plain, told

UNITS = {
    "bytes per s": "GB/s",
    "bytes": "GB",
    "gb s": "GB/s",
    "mib": "MiB",
    "kib": "KiB",
}
"""What an underscored name ends with, and what the page says in its place; bytes are divided by 1e9."""


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def figure(name: str, value: Any) -> tuple[str, str]:
    """A name and a number of the JSON as words, with a unit that reads well."""
    words = name.replace("_", " ")
    for ending, unit in UNITS.items():
        if words == ending or words.endswith(f" {ending}"):
            if ending.startswith("bytes") and isinstance(value, int | float):
                value = value / 1e9
            words = words.removesuffix(ending) + unit
            break
    return words, told(value)


def anything(result: Result) -> Iterator[str]:
    """Of a benchmark without a table of its own: its figures, a line each; of what lists things alike, a table."""

    def rows(found: Any, name: str = "") -> Iterator[Sequence[str]]:
        if isinstance(found, dict):
            for key, value in found.items():
                yield from rows(value, f"{name} {key}".strip())
        elif isinstance(found, list) and any(isinstance(value, (dict, list)) for value in found):
            for place, value in enumerate(found):
                yield from rows(value, f"{name} {place}".strip())
        elif is_plain(found):
            yield figure(name, found)

    report = {
        name: value
        for name, value in result["report"].items()
        if name not in ("benchmark", "device", "model", "note", "versions")
    }
    tables = {name: value for name, value in report.items() if _are_alike(value)}
    if plain := list(rows({name: value for name, value in report.items() if name not in tables})):
        yield from table(("figure", ""), iter(plain))
    for place, (name, alike) in enumerate(tables.items()):
        if plain or place:
            yield ""
        yield from (f"{figure(name, None)[0].capitalize()}:", "")
        yield from table([figure(key, None)[0] for key in alike[0]], ([told(value) for value in one.values()] for one in alike))


def _are_alike(value: object) -> bool:
    """Whether it is a list of things that have one number or word for each of the same names."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    return all(list(one) == list(value[0]) and not any(isinstance(each, dict | list) for each in one.values()) for one in value)


def sums(result: Result) -> Iterator[str]:
    """Of benchmarks/all_reduce.py."""
    report = result["report"]
    yield from (f"{report['ranks']} ranks; microseconds of a sum, by what each rank brings:", "")
    names = ("ours", "nccl", "torch")
    yield from table(
        ("KiB", "ours", "NCCL", "torch, one shot"),
        ([f"{one['kib']}", *(NONE if one[name] is None else f"{one[name]:.2f}" for name in names)] for one in report["us"]),
    )
    yield from ("", f"NCCL gathers 16 bytes of each rank in {report['gather_us']:.2f} us.")


def planned(result: Result) -> Iterator[str]:
    """Of benchmarks/plan_against_measured.py: a table for each case."""
    yield (
        "An error is the plan's figure over the measured one, less 1. Bytes behind a case's name are the plan's, by where weights lie: "
        "resident in the GPU's memory; in host memory, and streamed over the bus, fetched by rows, computed on by the CPU or only held."
    )
    for name, case in result["report"]["cases"].items():
        parts = [", ".join(f"{tier} {size / 1e9:.2f} GB" for tier, size in case["bytes_by_tier"].items())]
        if case["cap_bytes"] is not None:
            parts.append(f"the GPU's memory capped to {case['cap_bytes'] / 1e9:.2f} GB")
        if case["hit_rate"] is not None:
            parts.append(f"{case['hit_rate']:.1%} of the fetched rows were in the GPU's cache of rows, as the plan was told")
        yield from ("", f"**{name}**: {'; '.join(parts)}.", "")
        yield from table(("figure", "planned", "measured", "error"), (_compared(*each) for each in case["figures"].items()))


def _compared(what: str, found: dict[str, Any]) -> Sequence[str]:
    scale, unit = {"s": (1e3, " ms"), "bytes": (1e-9, " GB")}.get(found.get("unit", ""), (1.0, ""))
    what = what.replace("seconds", "time") + (f" ({found['note']})" if found.get("note") else "")
    sides = (found[side] for side in ("predicted", "measured"))
    error = found["error"]
    return (
        what,
        *(NONE if side is None else f"{side * scale:.4g}{unit}" for side in sides),
        NONE if error is None else f"{error:+.1%}",
    )


def same_tokens(result: Result) -> Iterator[str]:
    """Of benchmarks/gpu_equals_cpu.py."""
    ladders = result["report"]["ladders"]

    def rows() -> Iterator[Sequence[str]]:
        for name, found in ladders.items():
            ladder, _, how = name.rpartition(", ")
            gaps = ", ".join(f"{gap:.1e}" for gap in found["gaps"])
            yield f"`{ladder}`", how, f"{found['equal']} of {found['outputs']}", gaps or "none differs"

    yield (
        "Greedy outputs in float32, token by token against plain decoding on the CPU; where one parts, a gap is by how much the CPU "
        "prefers its own token."
    )
    yield ""
    yield from table(("ladder", "prompts", "equal", "gaps at the first difference"), rows())


def latency(result: Result) -> Iterator[str]:
    """Of `rowcast bench latency`: both sides, and the floor of decoding."""
    report = result["report"]
    ours, theirs, ratio, floor = (report.get(name) for name in ("rowcast", "transformers", "ratio", "floor"))
    kind = "random weights" if report["random_weights"] else "the model's weights"
    yield (
        f"{report['dtype']}, {kind}. A prompt of {report['prompt_tokens']:,} tokens is read; {report['max_tokens']} tokens are decoded "
        f"behind one of {report['context']:,}."
    )
    yield ""
    rows = {
        "loading, s": ("load_s", 1.0, "load"),
        "reading the prompt, ms": ("prefill_s", 1e3, "prefill"),
        "ms a token": ("decode_ms_per_token", 1.0, "decode"),
        "tokens/s": ("decode_tokens_per_s", 1.0, ""),
        "peak of the memory, GB": ("peak_bytes", 1e-9, ""),
    }

    def told_rows() -> Iterator[Sequence[str]]:
        for what, (name, scale, compared) in rows.items():
            sides = [NONE if side.get(name) is None else f"{side[name] * scale:.4g}" for side in (ours, theirs) if side]
            yield what, *sides, *([f"{ratio[compared]:.2f}x" if compared else ""] if ratio else [])

    yield from table(("", "Rowcast", *(["Transformers", "ratio"] if theirs else [])), told_rows())
    yield ""
    yield (
        f"Floor: {floor['weight_bytes'] / 1e9:.2f} GB of weights and {floor['kv_bytes'] / 1e9:.3f} GB of KV at "
        f"{floor['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s are {floor['decode_tokens_per_s']:,.0f} tokens/s; share {floor['share']:.2f}."
    )


CLAIMED = {
    "load": "no request lost, none different, no process grown by more than 64 MiB beside the KV that is kept of prompts, exit code 0",
    "saturation": "what was refused got 429 and Retry-After, none different, over .8 of the capacity's tokens/s, exit code 0",
    "long": "none failed, and the p99 between tokens is lower with the bound than without",
    "prefix": "no request lost, none different, the first token at least three times as early, exit code 0",
    "kill": "no request lost, none different, the server not ready and then ready again, tokens after the kill, exit code 0",
}
"""What `held` of each case in benchmarks/serving.py says."""
EXPLAINED = {
    "long": "All latencies are those of short requests: alone; with prompts of 1,500 tokens among them, which are read in chunks whose "
    "time is bounded; and without that bound.",
    "saturation": "Capacity is what 64 clients get that wait for each answer; saturated: three times as many requests a second are "
    "sent.",
    "prefix": "Cold: prompts of 1,040 tokens that share nothing; warm: such that share the first 1,024 with an earlier one.",
    "kill": "Chunks are pieces of answers, of all streams together, before and after the kill.",
}


def serving(result: Result) -> Iterator[str]:
    """A case of benchmarks/serving.py: what happened to the requests, then the latencies of each of its loads."""
    report = result["report"]
    case = report.get("case", "")
    if case in EXPLAINED:
        yield from (EXPLAINED[case], "")
    judged = report.get("accepted", report)
    if "equal" in judged:
        counts = ", ".join(f"{judged[name]} {name}" for name in ("requests", "lost", "equal", "excused", "different"))
        yield f"Against `LLM.generate` of the same requests: {counts} (excused: parted at a tie below 1e-4)."
        yield ""
    if "held" in report and case in CLAIMED:
        yield from (f"{'Held' if report['held'] else '**Did not hold**'}: {CLAIMED[case]}.", "")
    loads = {name: load for name, load in {"": report, **report}.items() if isinstance(load, dict) and "p99_ttft_ms" in load}
    if loads:
        head = ("", "requests/s", "tokens/s", "ms to the first token: median", "p99", "ms between tokens: median", "p99")
        yield from table(head, (_latencies(name or "all", load) for name, load in loads.items()))
        yield ""
    if "resident_mib" in report:
        yield from (*_memory(report), "")
    known = {"case", "model", "seconds", "held", "accepted", "resident_mib", "grown_mib", *_JUDGED, *loads}
    if "" in loads:
        known |= set(report) - _BESIDE_A_LOAD
    shown = {name: value for name, value in report.items() if name not in known}
    if isinstance(killed := shown.get("killed"), dict):
        shown["killed"] = {name: value for name, value in killed.items() if name != "pid"}
    yield from anything({"report": shown})


_JUDGED = ("requests", "lost", "equal", "excused", "different", "near_ties", "differences", "lost_as")
_BESIDE_A_LOAD = {"exit_code", "streams", "share_of_offline"}


def _latencies(name: str, load: dict[str, Any]) -> Sequence[str]:
    rates = (f"{load[rate]:.2f}" if load.get(rate) else "" for rate in ("request_throughput", "output_throughput"))
    times = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
    return name, *rates, *(f"{load[time]:,.0f}" for time in times)


def _memory(report: dict[str, Any]) -> Iterator[str]:
    """What processes hold, early and late."""
    resident, grown = report["resident_mib"], report["grown_mib"]
    names = dict.fromkeys(name for each in resident.values() for name in each)

    def rows() -> Iterator[Sequence[str]]:
        for name in names:
            sizes = (f"{each[name]:,.1f}" if name in each else NONE for each in resident.values())
            yield name, *sizes, f"{grown[name]:+.1f}" if name in grown else NONE

    yield from table(("MiB resident", *resident, "grown"), rows())
    yield ""
    yield (
        "Kept KV is the part of rank 0 that holds prompts' KV for others to come, in memory that is planned for it: what it grew by "
        "does not count."
    )
