"""docs/benchmarks.md and its pictures, from the JSON lines that benchmarks printed and that are kept in docs/results.

    python benchmarks/report.py --keep OUTPUT --command "rowcast bench kernels" --date 2026-11-27 --as kernels-h100    # add a result
    python benchmarks/report.py                                                                                       # write the page

`--keep` takes the last line of a benchmark's output, which is JSON, and keeps it with the command and the date, and with what a reader
has to know of this run (`--remark`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from report_figures import NONE, PLANNED_HEAD, Result, claims, details, draw, figures, foretold, has_figures, verdict
from report_tables import anything, latency, planned, same_tokens, serving, sums, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PAGE = ROOT / "docs/benchmarks.md"
IMAGES = ROOT / "docs/images"

HEAD = """# Benchmarks

Written by `python benchmarks/report.py` from the JSON lines in [results](results), which the commands beside them printed. Times on a
GPU are medians over warm runs with fresh random inputs. Shapes have random weights, unless a model is named: they show time and say
nothing of quality. What was tried on the way is in [experiments.md](experiments.md). `python benchmarks/suite.py --list` shows most of
them; without `--list` it runs those side by side on the GPUs of a machine.

What stands in the commands:

- `A.txt`, `B.txt`, `C.txt` are texts of your own, plain and in UTF-8: A and B to calibrate or train on, C to judge by, which nothing
  was learnt from. In place of A and B ours were three: the novels *Katrine* and *News from Nowhere* and WikiText-2's validation split;
  C is the whole of *Jack Sheppard* (Project Gutenberg's eBook 16215, of which tests/data has the first chapters).
- `RUN` is the folder that `suite.py -o` was given: what one benchmark makes, as a trained copy, another one reads there.

Words of the tables and lists:

- **floor**: the time in which the bytes that have to be read come at the rate of a copy, measured in the same run; the copy's bytes
  count as read and as written. **share**: floor over time. It may exceed 1, as that copy is no limit: it writes, too, and what only
  reads can be a little faster.
- **GB**: 1e9 bytes; beside a time a token, those that one GPU reads for it. **planned**: what `rowcast plan` foretells.
- **peers**, **beside**: others that did the same work in the same run. **x**: their time over ours; above 1 ours is faster.
- **wanted**: a bound that was set before it was measured; met or missed. Settings may have been changed after a first measurement:
  [experiments.md](experiments.md) says where.
- **round**: rungs of a ladder propose tokens, and the whole model judges them in one pass. **tokens per round** are those that stood,
  with the model's own; **acceptance** is the share of a rung's proposals that stood. Where it is simulated, rounds vary by chance:
  **on average** is what the given acceptances make of the tokens of a round, and a token's time is taken over that.
- **ms per round**: of all of it, and by rung; **between**: the round's time less that of its passes. **first s**: until the first
  token. **warm rounds**: those before the timed ones, in which kernels are compiled and CUDA graphs captured; **new graphs**: passes
  among the timed ones that were captured all the same.
- **speed up**: plain decoding's time over the ladder's, in turn on the same text, from the first token on. **later speed up**: the
  same over the second half of the tokens, without what happens once, as a draft reading the prompt. **identical**: the greedy output
  is plain decoding's; where it is not, **gap** is by how much plain prefers its own token there.
- **density**, **head density**: shares of the neurons and of the heads that were computed. **fallbacks**: rows for which the
  certified head read all of the vocabulary. **scheduling**: the time between steps over that on the GPU.
- **peak of the memory**: what each side allocated. Rowcast reserves KV at its start, for 64 sequences of the model's full length or
  for all that fits, whatever is then asked of it; Transformers' grows with the text.
- **ms to the first token**, **between tokens**: as a client of the server sees them. **held**: all that a case of serving claims was
  so; its section says what that is. **grown**: by how much a process is larger at the end than after a third of the requests, beside
  what it keeps more of prompts' KV for others to come.
"""


def kernels(result: Result) -> Iterator[str]:
    report = result["report"]
    yield f"A copy reaches {report['copy_bytes_per_s'] / 1e12:.2f} TB/s. A ratio is a peer's time over ours, in the same run."
    yield ""

    def rows() -> Iterator[Sequence[str]]:
        for case in next(value for value in report.values() if isinstance(value, list)):
            if "error" in case:
                yield case["name"], case["shape"], case["error"], "", "", ""
                continue
            peers = [f"{name} {peer['time_s'] * 1e6:.1f} ({peer['ratio']:.2f}x)" for name, peer in case["peers"].items()]
            note = f". {case['note']}" if case["note"] else ""
            floor, share = f"{case['floor_s'] * 1e6:.1f}", f"{case['share_of_floor']:.2f}"
            if case["family"] == "host":  # whose floor is the bus, not the GPU's memory
                floor, share = NONE, f"{case['peers']['dma']['ratio']:.2f} of dma" if "dma" in case["peers"] else NONE
            yield (
                case["name"],
                case["shape"] + note,
                f"{case['time_s'] * 1e6:.1f}",
                floor,
                share,
                ", ".join(peers),
            )

    yield from table(("kernel", "shape", "us", "floor, us", "share", "peers, us"), rows())
    yield ""
    yield f"![Kernels beside their floors](images/{result['name']}.svg)"


def draw_kernels(result: Result) -> None:
    """Each kernel whose floor is at least 5 us: the share of the floor, ours and the first peer's."""
    from matplotlib.figure import Figure

    cases = [case for case in _cases(result) if case.get("floor_s", 0) >= 5e-6 and case["family"] != "host"]
    figure = Figure(figsize=(9, 0.3 * len(cases) + 1), layout="constrained")
    axes = figure.subplots()
    for place, case in enumerate(reversed(cases)):
        axes.barh(place + 0.2, case["share_of_floor"], 0.38, color="#0072B2", label="Rowcast" if not place else None)
        for peer in list(case["peers"].values())[:1]:
            axes.barh(place - 0.2, case["floor_s"] / peer["time_s"], 0.38, color="#E69F00", label="_")
    axes.barh(0, 0, color="#E69F00", label="cuBLAS or torch, as in the table")
    axes.set_yticks(range(len(cases)), [f"{case['name']} {case['shape']}" for case in reversed(cases)], fontsize=7)
    axes.set_ylim(-1, len(cases))
    axes.axvline(1, color="#5A5A5A", linewidth=0.8)
    axes.set_xlabel("share of the floor of its own bytes (peers: of the same); 1 is the rate of a copy")
    axes.set_title(f"{result['report']['device']}, bfloat16")
    axes.legend(loc="upper right", fontsize=7)
    save(figure, result["name"])


def _cases(result: Result) -> list[dict[str, Any]]:
    return next(value for value in result["report"].values() if isinstance(value, list))


def with_figures(result: Result) -> Iterator[str]:
    """Of a benchmark that prints figures and claims."""
    head, *rows = figures(result)
    rate = result["report"].get("bandwidth")
    blocks = (
        [f"Floors are bytes at {rate / 1e9:.0f} GB/s, which was measured in the same run."] if rate else [],
        list(verdict(result)),
        list(table(head, iter(rows))) if rows else [],
        [f"![Times beside floors and plans](images/{result['name']}.svg)"] if len(rows) > 1 else [],
        list(claims(result)),
        list(details(result)),
    )
    yield from "\n\n".join("\n".join(lines) for lines in blocks if lines).splitlines()


def predictions(results: Sequence[Result]) -> Iterator[str]:
    """The planner's, of all results together."""
    rows = list(foretold(results))
    if rows:
        yield from (
            "## Predicted and measured",
            "",
            "Of every result that has both; the plans' own pages say what they were made for.",
            "",
        )
        yield from table(PLANNED_HEAD, iter(rows))
        yield ""


def opt_175b(result: Result) -> Iterator[str]:
    """Of benchmarks/opt_175b.py: decoding of one sequence, memory, a token's time by part, batches, a lost rank."""
    report = result["report"]
    plans = f" Plans are for {report['planned_for']}." if "planned_for" in report else ""
    yield f"{report['ranks']} ranks; a copy reaches {report['bandwidth'] / 1e12:.2f} TB/s. Bytes are of a rank.{plans}"
    yield ""
    planned = {name.partition("_")[2]: each for name, each in report.items() if name.startswith("plan_")}
    runs = [each for name, each in report.items() if each and (name == "dense" or name.startswith("sparse"))]

    def decoding() -> Iterator[Sequence[str]]:
        for run in runs:
            plan = planned.get("dense" if run["ladder"] == "plain" else "sparse")
            numbers = run["ms_per_token"], run["floor_ms"], run["share_of_floor"], run["on_device_ms"], run["read_bytes"] / 1e9
            plan_ms = "" if plan is None else f"{plan['ms_per_token']:.2f}"
            starts = f"{run['load_s']:.1f}", f"{run['warm_s']:.1f}", f"{run['ttft_s']:.2f}"
            yield run["ladder"], *(f"{number:.2f}" for number in numbers), plan_ms, *starts

    if runs:
        head = ("ladder", "ms a token", "floor, ms", "share", "on the device, ms", "GB", "planned, ms")
        yield from table((*head, "loaded after, s", "warm after, s", "first token, s"), decoding())
        yield ""
    for name, each in report.items():
        if name.startswith("memory"):
            parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in each["planned"].items())
            taken = ", ".join(f"{rank['allocated'] / 1e9:.2f} ({rank['device'] / 1e9:.2f})" for rank in each["ranks"])
            what = "sparse" if "sparse" in name else "dense"
            yield f"Memory, {what}: planned {each['planned_bytes'] / 1e9:.2f} GB ({parts}); allocated, and taken of the GPU: {taken}."
            yield ""
    for name, each in report.items():
        if name.startswith("token") and each:
            what = name.partition(", ")[2] or "dense"
            yield f"A token by part, {what}, on rank 0, {each['token_ms']:.2f} ms under the profiler:"
            yield ""
            rows = ((part, f"{ms:.2f}", f"{each['floor_ms'][part]:.2f}") for part, ms in each["ms"].items())
            yield from table(("part", "ms", "floor, ms"), rows)
            yield ""
            if note := each.get("note"):
                yield f"Note: {note}."
                yield ""
    batches = {name.partition("_")[2]: {one["batch"]: one for one in each} for name, each in report.items() if "batch_" in name}
    if batches:
        sizes = sorted({size for each in batches.values() for size in each})
        steps = (
            (f"{size}", *(f"{each[size]['step_ms']:.2f}, {each[size]['read_bytes'] / 1e9:.1f}" for each in batches.values()))
            for size in sizes
        )
        yield from table(("sequences", *(f"{name}: ms a step, GB" for name in batches)), steps)
        yield ""
    if killed := report.get("kill"):
        same = "equal to an undisturbed run's"
        if (where := killed["differs_at"]) is not None:
            same = f"as undisturbed up to number {where}, a tie within {killed['gap']}"
        yield (
            f"A rank killed after {killed['killed_after']} of {killed['tokens']} tokens: the next one after {killed['seconds']:.1f} s, "
            f"the output {same}."
        )
        yield ""
    if eager := report.get("transformers"):
        yield (
            f"Transformers, eager, one GPU: {eager['layer_ms']:.2f} ms a layer ({eager['layers']} of them ran), all of the shape's "
            f"with the head {eager['token_ms']:.0f} ms by count."
        )
        yield ""
    if report.get("claims"):
        yield from (*claims({**result, "report": {**report, "failed": []}}), "")
    for why in report.get("failed", []):
        yield f"Not measured: {why}."
        yield ""


TABLES: dict[str, Callable[[Result], Iterator[str]]] = {
    "all": sums,
    "exact": same_tokens,
    "kernels": kernels,
    "latency": latency,
    "opt175b": opt_175b,
    "planned": planned,
    "serving": serving,
}
PICTURES: dict[str, Callable[[Result], None]] = {"kernels": draw_kernels}
"""By the first part of a result's name, before a dash."""


def save(figure: Any, name: str) -> None:
    """The same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rowcast"}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None})


def page(results: Sequence[Result]) -> str:
    lines = [HEAD]
    for result in results:
        report = result["report"]
        gpu = report.get("device_name") or report.get("device")
        device = ", ".join(part for part in (report.get("model"), gpu, result.get("where")) if part)
        source = f"[results/{result['name']}.json](results/{result['name']}.json)"
        versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
        lines += [f"## {result['title']}", ""]
        lines += [
            ", ".join(part for part in (result["date"], device, versions) if part) + f" ({source}):",
            "",
            f"    {result['command']}",
            "",
        ]
        if report.get("cut_off"):
            lines += ["**It was cut off: what it had not measured by then is not here.**", ""]
        if note := report.get("note"):
            lines += [f"**{note}.**", ""]
        if remark := result.get("remark"):
            lines += [remark, ""]
        other = with_figures if has_figures(result) else anything
        lines += [*TABLES.get(result["name"].partition("-")[0], other)(result), ""]
    return "\n".join([*lines, *predictions(results)])


def kept() -> list[Result]:
    return [{**json.loads(path.read_text()), "name": path.stem} for path in sorted(RESULTS.glob("*.json"))]


def without_places(report: dict[str, Any]) -> dict[str, Any]:
    """The report with a model that is a path of the machine put down as its name."""
    model = report.get("model")
    if not (isinstance(model, str) and Path(model).is_absolute()):
        return report
    return {**report, "model": Path(model).name.removesuffix(".gguf")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a benchmark's output; its last line is JSON")
    parser.add_argument("--as", dest="name", help="the result's name: KIND-WHERE")
    parser.add_argument("--title", help="of its section")
    parser.add_argument("--remark", help="a sentence of its section: what a reader has to know of this run")
    parser.add_argument("--command", help="what printed it")
    parser.add_argument("--date", help="when, as 2026-11-27")
    parser.add_argument("--where", help="on what, if the line itself does not say so")
    given = parser.parse_args()
    if given.keep:
        missing = [
            f"--{name}" for name in ("as", "title", "command", "date") if not vars(given)["name" if name == "as" else name]
        ]
        if missing:
            parser.error(f"--keep needs {', '.join(missing)}, too")
        report = without_places(json.loads(given.keep.read_text().strip().splitlines()[-1]))
        remark = {"remark": given.remark} if given.remark else {}
        result = {
            "title": given.title,
            **remark,
            "date": given.date,
            "where": given.where,
            "command": given.command,
            "report": report,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{given.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = kept()
    for result in results:
        if picture := PICTURES.get(result["name"].partition("-")[0]):
            picture(result)
        elif has_figures(result) and (drawn := draw(result)) is not None:
            save(drawn, result["name"])
    PAGE.write_text(page(results))
    print(f"{PAGE.relative_to(ROOT)}: {len(results)} results", file=sys.stderr)


if __name__ == "__main__":
    main()
