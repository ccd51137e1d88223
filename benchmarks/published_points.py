"""What the cost model says of decode times that others published, and of our own on an H100: one set of constants, given placements.

    python benchmarks/published_points.py [--markdown]

No solver: each point is a model, a machine out of the table of cards and the placement that was published. Times are of one pass or one
committed token unless the point says otherwise. --markdown prints the tables of docs/planning.md. The last line is JSON. Torch-free.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from published_cases import (  # Beside this file.
    A100_TRIFORCE,
    DEJA_VU,
    OPT_175B,
    PLAIN,
    RTX4090,
    STREAMED_30B,
    TRIFORCE_7B,
    TRIFORCE_13B,
    YARN_7B,
    YARN_13B,
    Case,
    copy_tb_s,
    dejavu_gain,
    layer_us,
    pass_ms,
    price,
    spec_of,
    streamed_30b_s,
    token_ms,
    triforce_gain,
)

from rowcast.placement.constants import Constants

Role = Literal["fitted", "checked", "structure only", "not covered"]
"""fitted: a constant has its value from this point. checked: none has. structure only: an input that nobody published was inferred or
taken from another run. not covered: the model leaves out what bounds it, so that it misses."""

PYTHON_LAYER_S = 1e-3
"""What the calls of one layer take from Python: .97 ms measured with Transformers, 1.1 ms as published of an OPT-175B."""

MOST_ERROR, MOST_OWN_ERROR = 0.25, 0.10
"""Of all points but those that are not covered; of our own required ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    key: str
    what: str
    published: float
    unit: str
    role: Role
    origin: Literal["published", "own"] = "published"
    required: bool = False
    """Those that the planner has to reproduce; the others show how far it reaches."""
    source: str
    assumptions: str
    model: Callable[[Constants], float] = field(repr=False)

    @property
    def most_error(self) -> float:
        """Infinite where the model does not cover the point."""
        if self.role == "not covered":
            return math.inf
        return MOST_OWN_ERROR if self.origin == "own" and self.required else MOST_ERROR

    def error(self, constants: Constants) -> float:
        return self.model(constants) / self.published - 1


TRIFORCE, TRIFORCE_CODE = "TriForce, arXiv 2404.11912", "github.com/Infini-AI-Lab/TriForce"
GPT_FAST = "github.com/pytorch-labs/gpt-fast, README"
FLEXGEN = "FlexGen, arXiv 2303.06865"
DEJA_VU_DRAFT = "Deja Vu as submitted for review (ICML 2023), table 4"
OWN = "docs/experiments.md, 2026-11-26"

_ACCEPTANCE = (
    "acceptance unpublished: .9137 outer and .4036 inner are those of 122K on an A100 (table 2, T = .6), read as per token"
)
_COMPILED = "compiled and captured; card held to 330 W; 100 tokens of context; sums by one-shot all-reduce over NVLink"


def _scaling(model: str, name: str, gpus: int, tokens_per_s: float, role: Role) -> Point:
    return Point(
        key=f"gpt-fast-{name}-x{gpus}",
        what=f"Llama-2-{name} on {gpus} x A100-80GB",
        published=1e3 / tokens_per_s,
        unit="ms",
        role=role,
        source=f"{GPT_FAST}: {tokens_per_s:g} tokens/s",
        assumptions=_COMPILED,
        model=partial(token_ms, Case(model=model, gpus=f"{gpus}xA100-80GB", context=100)),
    )


def _stock_streaming(pinned: int, batch: int, tokens_per_s: float) -> Point:
    case = Case(
        model="facebook/opt-30b", gpus="V100-32GB", context=9, batch=batch, eager=True, weights_on_chip=pinned / 30
    )  # fmt: skip
    return Point(
        key=f"deepspeed-30b-{pinned}",
        what=f"OPT-30B on a V100-32GB, {30 - pinned} of 30 billion weights streamed, batch {batch}, a step",
        published=batch / tokens_per_s,
        unit="s",
        role="not covered",
        source=f"DeepSpeed ZeRO-Inference blog, 2022-09-10, table 2: {tokens_per_s:g} tokens/s",
        assumptions="the framework's copies come at 10.1 GB/s, .63 of the link, in all three rows",
        model=lambda constants: price(case, constants).token_s,
    )


def _host(name: str, case: Case, published: float, source: str, assumptions: str) -> Point:
    return Point(
        key=name, what=assumptions.split(";")[0], published=published, unit="ms", role="not covered", source=source,
        assumptions=assumptions.split("; ", 1)[1], model=partial(token_ms, case),
    )  # fmt: skip


POINTS: tuple[Point, ...] = (
    Point(
        key="triforce-7b-plain", required=True, role="checked", unit="ms", published=840,
        what="Llama-2-7B-128K, 127K, two RTX 4090, plain",
        source=f"{TRIFORCE}, table 3; {TRIFORCE_CODE}, README (--baseline --on_chip 12 --prefill 130048)",
        assumptions="KV of 12 layers on chip, of 20 streamed; PCIe 4.0 x16 for each card (not stated); halves by heads",
        model=partial(token_ms, Case(model=YARN_7B, gpus="2xRTX4090", context=130_048, eager=True, kv_on_chip=12)),
    ),
    Point(
        key="triforce-7b", required=True, role="structure only", unit="ms", published=108,
        what="the same, TriForce", source=f"{TRIFORCE}, table 3; README (--on_chip 9 --budget 12288 --gamma 16)",
        assumptions=f"{_ACCEPTANCE}; KV of 9 layers on chip; one draft token a retrieval pass (code); passes that calls from "
        "Python do not bound (see below); a host as desktops have it (the published one had an EPYC 9754)",
        model=partial(token_ms, TRIFORCE_7B),
    ),
    Point(
        key="triforce-13b-plain", required=True, role="structure only", unit="ms", published=1794,
        what="Llama-2-13B-128K, 127K, two RTX 4090, plain", source=f"{TRIFORCE}, table 3",
        assumptions="KV of 5 layers on chip: inferred from the cards' memory and the published time (one more or less is 3%); "
        "else as with 7B",
        model=partial(token_ms, Case(model=YARN_13B, gpus="2xRTX4090", context=130_048, eager=True, kv_on_chip=5)),
    ),
    Point(
        key="triforce-13b", required=True, role="structure only", unit="ms", published=226,
        what="the same, TriForce", source=f"{TRIFORCE}, table 3",
        assumptions="KV of 2 layers on chip: inferred; acceptances, budget and gamma as with 7B",
        model=partial(token_ms, TRIFORCE_13B),
    ),
    Point(
        key="triforce-one-4090", role="structure only", unit="ms", published=312,
        what="Llama-2-7B-128K, 127K, one RTX 4090, TriForce", source=f"{TRIFORCE}, table 3; README (--budget 8192 --gamma 12)",
        assumptions=f"{_ACCEPTANCE}; KV of all layers streamed; which of two published commands: not stated",
        model=partial(token_ms, RTX4090(YARN_7B, "RTX4090", budget=8192, gamma=12, on_chip=0)),
    ),
    Point(
        key="triforce-a100-full", required=True, role="checked", unit="ms", published=56,
        what="Llama-2-7B-128K, 122K, one A100, full pass", source=f"{TRIFORCE}, figure 1; {TRIFORCE_CODE} (--prefill 124928)",
        assumptions="80 GB SXM card (its form is not stated); the whole KV on chip",
        model=partial(pass_ms, A100_TRIFORCE, 2),
    ),
    Point(
        key="triforce-a100-retrieval", required=True, role="fitted", unit="ms", published=14,
        what="the same, retrieval pass", source=f"{TRIFORCE}, figure 1",
        assumptions="4,096 entries; captured, but a framework's own kernels: `eager_layer_s` is from here",
        model=partial(pass_ms, A100_TRIFORCE, 1),
    ),
    Point(
        key="triforce-a100-draft", role="checked", unit="ms", published=0.45,
        what="the same, pass of the 68M draft", source=f"{TRIFORCE}, figure 1", assumptions="256 entries; its embeddings count as read",
        model=partial(pass_ms, A100_TRIFORCE, 0),
    ),
    Point(
        key="triforce-a100-gain", role="checked", unit="x", published=2.31,
        what="the same, TriForce against plain, T = 0", source=f"{TRIFORCE}, table 2",
        assumptions="outer .9234, inner .4649 (table 2), gamma 6 (table 8), one draft token a retrieval pass (code)",
        model=triforce_gain,
    ),
    Point(
        key="dejavu-gain", required=True, role="checked", unit="x", published=2.0,
        what="OPT-175B on 8 x A100-80GB, Deja Vu against FasterTransformer",
        source="Deja Vu, arXiv 2310.17157, abstract (over 2x)",
        assumptions="10% of the neurons, 5 of 12 heads with their keys and values; predictors of rank 1000 and 512 in line, first "
        "factors on every rank (published code); 178 tokens of context; fused kernels on both sides",
        model=dejavu_gain,
    ),
    Point(
        key="dejavu-dense", role="checked", unit="ms", published=40.5,
        what="the same, FasterTransformer, prompt of 128", source=DEJA_VU_DRAFT, assumptions="as above",
        model=partial(token_ms, OPT_175B),
    ),
    Point(
        key="dejavu-sparse", role="checked", unit="ms", published=15.9,
        what="the same, Deja Vu, prompt of 128", source=DEJA_VU_DRAFT, assumptions="as above",
        model=partial(token_ms, DEJA_VU),
    ),
    Point(
        key="flexgen-streaming", required=True, role="checked", unit="s", published=8 * 32 / 1.57,
        what="OPT-30B on a T4, all weights streamed, KV on chip, 8 x 32 tokens behind prompts of 512",
        source=f"{FLEXGEN}, table 4 (DeepSpeed policy: 1.57 tokens/s); github.com/FMInference/FlexGen, bench_suite.py (--percent 0 100 "
        "100 0 100 0 --gpu-batch-size 8)",
        assumptions="one pass over the prompts and 31 steps, at the mean context of 528 tokens", model=streamed_30b_s,
    ),
    Point(
        key="sequoia-70b", role="checked", unit="s", published=9 * 0.57,
        what="Llama-2-70B in 16 bits on one RTX 4090, all weights streamed",
        source="Sequoia's project page: .57 s a token, 9 times as fast as DeepSpeed",
        assumptions="PCIe 4.0 x16; a context of 512 tokens",
        model=lambda constants: price(
            Case(model="meta-llama/Llama-2-70b-hf", gpus="RTX4090", context=512, eager=True, weights_on_chip=0), constants
        ).token_s,
    ),
    _scaling("meta-llama/Llama-2-7b-hf", "7B", 1, 104.9, "checked"),
    _scaling("meta-llama/Llama-2-7b-hf", "7B", 2, 168.84, "checked"),
    _scaling("meta-llama/Llama-2-7b-hf", "7B", 4, 254.02, "checked"),
    _scaling("meta-llama/Llama-2-7b-hf", "7B", 8, 328.43, "fitted"),
    _scaling("meta-llama/Llama-2-70b-hf", "70B", 2, 21.32, "checked"),
    _scaling("meta-llama/Llama-2-70b-hf", "70B", 4, 38.01, "checked"),
    _scaling("meta-llama/Llama-2-70b-hf", "70B", 8, 62.5, "checked"),
    _stock_streaming(12, 64, 18),
    _stock_streaming(10, 128, 32),
    _stock_streaming(0, 256, 43),
    Point(
        key="flexgen-cpu-attention", role="not covered", unit="s", published=12.5,
        what="OPT-30B on a T4, FlexGen's best policy (7.32 tokens/s), a decode step of 144 sequences",
        source=f"{FLEXGEN}, tables 2 and 3: 144 x (32 / 7.32 - 31 / 11.52) s of prompts leave it",
        assumptions="a fifth of the weights on chip; attention runs on the CPU there, here all KV crosses the bus instead",
        model=lambda constants: price(
            replace(STREAMED_30B, rungs=(PLAIN,), batch=144, weights_on_chip=0.2, kv_on_chip=0), constants
        ).token_s,
    ),
    _host(
        "transformers-175b", replace(OPT_175B, eager=True), 107.9, DEJA_VU_DRAFT,
        "OPT-175B on 8 x A100-80GB, Hugging Face, prompt of 128; 1.1 ms of calls from Python a layer, at any length",
    ),
    _host(
        "transformers-7b", Case(model="meta-llama/Llama-2-7b-hf", gpus="H100", context=1024, eager=True), 31.1, OWN,
        "Llama-2-7B on an H100, Transformers eager; .97 ms of calls from Python a layer, 1.7 ms in a run on another host",
    ),
    Point(
        key="own-copy", required=True, role="fitted", origin="own", unit="TB/s", published=2.96,
        what="a copy inside an H100, read and written", source=OWN, assumptions="", model=copy_tb_s,
    ),
    Point(
        key="own-7b", required=True, role="fitted", origin="own", unit="ms", published=5.53,
        what="Llama-2-7B on an H100 behind 1,024 tokens", source=f"{OWN}: 5.51 to 5.56 ms", assumptions="captured",
        model=partial(token_ms, Case(model="meta-llama/Llama-2-7b-hf", gpus="H100", context=1024)),
    ),
    Point(
        key="own-135m", required=True, role="fitted", origin="own", unit="ms", published=1e3 / 1293,
        what="SmolLM2-135M on an H100", source=f"{OWN}: 1,293 tokens/s", assumptions="captured; 32 tokens of prompt and some more",
        model=partial(token_ms, Case(model="HuggingFaceTB/SmolLM2-135M", gpus="H100", context=64)),
    ),
    Point(
        key="own-32k", required=True, role="checked", origin="own", unit="ms", published=10.9,
        what="Llama-2-7B-128K on an H100 behind 32,768 tokens, full pass", source=OWN, assumptions="captured",
        model=partial(pass_ms, Case(model=YARN_7B, gpus="H100", context=32_768), 0),
    ),
    Point(
        key="own-verify", role="checked", origin="own", unit="ms", published=11.3,
        what="the same, 7 tokens", source=OWN, assumptions="captured",
        model=partial(pass_ms, Case(model=YARN_7B, gpus="H100", context=32_768, rungs=(replace(PLAIN, tokens=7),)), 0),
    ),
    Point(
        key="own-retrieval", role="checked", origin="own", unit="ms", published=6.56,
        what="the same, 3 tokens over 4,096 entries by list", source=OWN, assumptions="captured; chunks count as a long KV does",
        model=partial(
            pass_ms, Case(model=YARN_7B, gpus="H100", context=32_768, rungs=(replace(PLAIN, tokens=3, kv_entries=4096),)), 0
        ),
    ),
    Point(
        key="own-opt-layer", role="checked", origin="own", unit="us", published=565,
        what="an OPT layer, d 8192, behind 1,024 tokens on an H100", source=OWN, assumptions="captured",
        model=partial(layer_us, PLAIN, 0),
    ),
    Point(
        key="own-sparse-layer", role="checked", origin="own", unit="us", published=290,
        what="the same, 10% of the neurons", source=OWN, assumptions="captured; a predictor of rank 512 in 8 bits",
        model=partial(layer_us, replace(PLAIN, neurons=0.1, candidates=0.1), 512 * (8192 + 32_768)),
    ),
)  # fmt: skip


def describe(point: Point, constants: Constants) -> dict[str, Any]:
    found = point.model(constants)
    return {
        "key": point.key, "what": point.what, "published": point.published, "model": found, "unit": point.unit,
        "error": found / point.published - 1, "role": point.role, "origin": point.origin, "required": point.required,
    }  # fmt: skip


def row(point: Point, constants: Constants) -> list[str]:
    """Of the tables here and in docs/planning.md."""
    told = describe(point, constants)
    values = (
        f"{told[name]:.3g} {point.unit}" if told[name] < 1000 else f"{told[name]:.0f} {point.unit}"
        for name in ("published", "model")
    )
    return [point.what, *values, f"{round(told['error'] * 100) + 0:+d}%", f"**{point.role}**" if point.required else point.role]


def unpublished(key: str, case: Case, constants: Constants) -> str:
    """What a published time of TriForce's on 4090s says of tokens a round, and what it would be were its passes bound by Python."""
    point = next(point for point in POINTS if point.key == key)
    times, tokens = price(case, constants), case.tokens_per_round
    longer = max(0.0, spec_of(case.model).num_layers * PYTHON_LAYER_S - times.pass_s[1])
    implied = times.token_s * 1e3 * tokens / point.published
    bound = (times.token_s + case.rungs[1].passes * longer / tokens) * 1e3
    return (
        f"{point.published:g} ms implies {implied:.1f} tokens a round where {tokens:.1f} are modelled; with retrieval passes that take "
        f"{PYTHON_LAYER_S * 1e3:g} ms a layer the model has {bound:.0f} ms."
    )


def notes(constants: Constants) -> list[str]:
    return [unpublished(key, case, constants) for key, case in (("triforce-7b", TRIFORCE_7B), ("triforce-13b", TRIFORCE_13B))]


def table(origin: str, constants: Constants) -> str:
    """As docs/planning.md has it."""
    head = "published" if origin == "published" else "measured"
    rows = [f"| point | {head} | model | error | | source; assumptions |", "|---|---|---|---|---|---|"]
    for point in POINTS:
        if point.origin == origin:
            rows.append(f"| {' | '.join(row(point, constants))} | {'; '.join(filter(None, (point.source, point.assumptions)))} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="the tables as docs/planning.md has them")
    args = parser.parse_args()
    constants = Constants()
    if args.markdown:
        print(table("published", constants), *notes(constants), table("own", constants), sep="\n\n")
        return
    for point in POINTS:
        what, published, model, error, _ = row(point, constants)
        print(f"{what}: {published}, model {model}, {error}, {point.role}")
        print(f"    {'; '.join(filter(None, (point.source, point.assumptions)))}")
    print(*notes(constants), sep="\n")
    print(json.dumps({"points": [describe(point, constants) for point in POINTS]}))


if __name__ == "__main__":
    main()
