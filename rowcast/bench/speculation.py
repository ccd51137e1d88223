"""What `rowcast bench speculation` measures: ladders beside plain decoding, all in one process and in turn.

A round visits every ladder once, plain first. A visit loads the model, warms up on the head of the first prompt, then runs all prompts
together. Decoding is timed from the moment when every prompt has its first token, so a draft model that reads the prompt only when
it is first used does that on this clock; `later_s_per_token` leaves it out, as it is taken over the second half of the tokens.

Shapes without weights run on random ones. Their acceptance would mean nothing, so it is simulated at given rates; verification,
refresh, rollback and sampling all run. Whatever is reported of such a run says so.
"""

from __future__ import annotations

import gc
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rowcast import LLM, SamplingParams
from rowcast.bench.latency import read_bandwidth
from rowcast.bench.pace import Mark, Pace, pace
from rowcast.bench.shapes import ShapeLLM, open_shape
from rowcast.bench.speculation_gaps import find_gaps
from rowcast.errors import UserError
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.outputs import RequestStats
from rowcast.runtime.planning import Target, Wish, make_plan
from rowcast.runtime.request import Request
from rowcast.runtime.sparse.artefact import beside
from rowcast.runtime.step import PREFILL, RungCounts
from rowcast.runtime.tokenizer import load_tokenizer

WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 16
"""On a CPU."""
SHAPE_KV, LEAST_SHAPE_KV = 4096, 96
"""KV entries of the rung self where a shape is measured and no budget is given (TriForce, arXiv 2404.11912, section 5)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line, under their names."""

    model: str | None = None
    """None: a shape."""
    dtype: str = "auto"
    device: str = "auto"
    prompt_file: str | None = None
    prompt_tokens: int | None = None
    ladder: tuple[str, ...] = ()
    """None given: `auto` and whatever else the other options make possible."""
    draft: str | None = None
    kv_budget: int | None = None
    density: float | None = None
    calibration: str | None = None
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    verification: str = "coupled"
    batch: int = 1
    repeat: int = 3
    against_transformers: bool = False
    shape: str | None = None
    simulate: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for options that contradict each other."""
        if (self.shape is None) != (self.simulate is None):
            given, lacking = ("--shape", "--simulate") if self.simulate is None else ("--simulate", "--shape")
            raise UserError(
                f"{given} was given without {lacking}: acceptance is simulated where there are no weights, and only there, so give both"
            )
        if self.shape is None and self.prompt_file is None:
            raise UserError(
                "acceptance depends on the text: give --prompt-file FILE, or --shape with --simulate and --prompt-tokens"
            )
        if self.shape is not None and (self.prompt_file is not None or self.model is not None):
            name = "--prompt-file" if self.prompt_file is not None else "--model"
            raise UserError(f"{name} has no place beside --shape, whose weights and prompts are random: leave it out")
        if self.shape is not None and self.prompt_tokens is None:
            raise UserError("a shape has no text: give the length of its random prompts with --prompt-tokens")
        if self.against_transformers and (self.draft in (None, "ngram") or self.batch != 1 or self.shape is not None):
            raise UserError(
                "--against transformers measures assisted generation: give --draft with a model, --batch 1 and a model with weights"
            )

    @property
    def ladders(self) -> list[str]:
        """Plain, then what stands beside it."""
        chosen = list(self.ladder) or self._available()
        found = ["plain", *(ladder for ladder in dict.fromkeys(chosen) if ladder != "plain")]
        given = {
            "--draft": self.draft,
            "--kv-budget": self.kv_budget,
            "--density": self.density,
            "--calibration": self.calibration,
        }
        for at, (option, value) in enumerate(given.items()):
            if value is not None and not any(self.places(ladder)[at] for ladder in found):
                raise UserError(
                    f"{option} {value} has no place in the ladders {', '.join(found)}: leave it out, or add --ladder auto"
                )
        return found

    def _shape_kv(self) -> int:
        return min(SHAPE_KV, max(LEAST_SHAPE_KV, (self.prompt_tokens or 0) // 8))

    def _available(self) -> list[str]:
        if self.shape is not None:
            return ["triforce"] if self.draft is not None else [f"self:kv={self.kv_budget or self._shape_kv()} / plain"]
        found = ["auto", "ngram"]
        if self.draft not in (None, "ngram"):
            found += ["draft / plain", "triforce"]
        found += ["dejavu"] * (self.calibration is not None) + ["hire"] * (self.density is not None)
        return found + ([f"self:kv={self.kv_budget} / plain"] if self.kv_budget is not None else [])

    def places(self, ladder: str) -> tuple[bool, bool, bool, bool]:
        """Whether a ladder has a place for --draft, --kv-budget, --density and --calibration."""
        if ladder in ("auto", "triforce"):
            return True, True, ladder == "auto", ladder == "auto"
        if ladder in ("dejavu", "hire"):
            return False, False, True, True
        if ladder in ("plain", "ngram"):
            return ladder == self.draft, False, False, False
        rungs = Ladder.parse(ladder).rungs
        draft, sparse = any(rung.kind == "draft" and rung.model is None for rung in rungs), any(rung.sparse for rung in rungs)
        return draft, False, False, sparse

    @property
    def rates(self) -> tuple[float, float] | None:
        """Simulated acceptance by the last rung and by the rungs below it. Raises UserError."""
        if self.simulate is None:
            return None
        try:
            given = [float(part) for part in self.simulate.split(",")]
        except ValueError:
            given = []
        if len(given) not in (1, 2) or not all(0 <= rate <= 1 for rate in given):
            raise UserError(f"--simulate {self.simulate!r:.60} has to be one or two rates from 0 to 1, as in 0.92,0.6")
        return given[0], given[-1]

    @property
    def label(self) -> str:
        """What every line about a run with simulated acceptance says; empty for real text."""
        if self.rates is None:
            return ""
        outer, inner = self.rates
        return f"simulated acceptance, rule {self.verification}, outer rate {outer:g}, inner rate {inner:g}"

    @property
    def comparable(self) -> bool:
        """Whether the output has to be plain's, token for token."""
        return self.shape is None and (self.verification == "coupled" or self.temperature == 0)

    def params(self, tokens: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=tokens, ignore_eos=True, detokenize=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """One visit. Times are of decoding, for all sequences together."""

    outputs: list[list[int]]
    prefill_s: float
    pace: Pace
    tokens: int
    """Of all decoding rounds of all sequences, as are `rounds` and `rungs`."""
    rounds: int
    rungs: dict[str, RungCounts]


def run(settings: Settings) -> dict[str, Any]:
    """Measure and return the report. Raises UserError as `LLM` does, and where the file holds too little text."""
    ladders, params, label = settings.ladders, settings.params(settings.max_tokens), settings.label
    checkpoint = _checkpoint(settings)
    prompts = _prompts(settings, checkpoint)
    context = len(prompts[0]) + settings.max_tokens
    _check(settings, checkpoint, ladders, context)
    samples: dict[str, list[Sample]] = {ladder: [] for ladder in ladders}
    resolved: dict[str, str] = {}
    peer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    place: dict[str, Any] = {}
    for _ in range(settings.repeat):
        for ladder in ladders:
            llm = _load(settings, ladder, context)
            resolved[ladder] = llm.plan.ladder_text
            place = {"dtype": llm.plan.dtype, "device": llm.plan.device}
            warm_up(llm, prompts, settings)
            samples[ladder].append(decode(llm, prompts, params))
            del llm
            _release()
        if settings.against_transformers:
            from rowcast.bench import assisted

            for name, found in assisted.visit(settings, prompts[0], **place).items():
                peer[name].append(found)
            _release()

    report: dict[str, Any] = {
        "benchmark": "speculation",
        **({"label": label, "rates": settings.rates} if label else {}),
        **asdict(settings),
        **place,
        "prompt_tokens": len(prompts[0]),
        "threads": torch.get_num_threads(),
    }
    bandwidth = read_bandwidth(torch.device(place["device"]).type)
    report["bandwidth_bytes_per_s"] = bandwidth
    plain = samples["plain"]
    gaps = {}
    if settings.comparable:
        outputs = {ladder: [visit.outputs for visit in visits] for ladder, visits in samples.items()}
        gaps = find_gaps(outputs, prompts, settings.temperature, settings.seed, lambda: _load(settings, "plain", context))
    report["ladders"] = {}
    for ladder in ladders:
        entry = {"ladder": resolved[ladder], **_summary(resolved[ladder], samples[ladder], plain, bandwidth)}
        if settings.comparable:
            entry["differences"] = gaps[ladder]
            entry["identical"] = not gaps[ladder]
        report["ladders"][ladder] = entry
    if peer:
        report["transformers"] = assisted.summary(peer)
    return report


def warm_up(llm: LLM, prompts: Sequence[list[int]], settings: Settings) -> None:
    """On a GPU the same that is measured then: kernels are compiled and passes captured where a length is met first, and how long the
    drafts are is decided meanwhile, which decides what passes there are."""
    if torch.device(llm.plan.device).type == "cuda":
        decode(llm, prompts, settings.params(settings.max_tokens))
    else:
        decode(llm, [prompts[0][:WARM_UP_PROMPT]], settings.params(WARM_UP_TOKENS))


def decode(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> Sample:
    """Run all prompts together, prompt i with the seed of `params` + i, and time what comes after each has its first token."""
    engine, device = llm.engine, torch.device(llm.plan.device)
    started = _now(device)
    requests = [engine.add(ids, replace(params, seed=(params.seed or 0) + i)) for i, ids in enumerate(prompts)]
    while not all(request.stats.generated_tokens for request in requests):
        engine.step()
    marks: list[Mark] = [(_now(device), _generated(requests))]
    while engine.has_work:
        engine.step()
        marks.append((_now(device), _generated(requests)))
    rungs = _sum(request.stats.rungs for request in requests)
    return Sample(
        outputs=[request.output().outputs[0].token_ids for request in requests],
        prefill_s=marks[0][0] - started,
        pace=pace(marks),
        tokens=sum(request.stats.round_tokens for request in requests),
        rounds=sum(request.stats.rounds for request in requests),
        rungs={name: counts for name, counts in rungs.items() if name != PREFILL},
    )


def _checkpoint(settings: Settings) -> Checkpoint:
    if settings.shape is not None:
        return open_shape(settings.shape)
    assert settings.model is not None
    return open_checkpoint(settings.model)


def _prompts(settings: Settings, checkpoint: Checkpoint) -> list[list[int]]:
    """`batch` prompts of the same length: random ids, or consecutive pieces of the file."""
    batch, tokens = settings.batch, settings.prompt_tokens
    if settings.shape is not None:
        assert tokens is not None
        draw, vocabulary = random.Random(settings.seed), spec_from_config(checkpoint.config).vocab_size
        return [draw.choices(range(vocabulary), k=tokens) for _ in range(batch)]
    assert settings.prompt_file is not None
    try:
        text = Path(settings.prompt_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"cannot read --prompt-file {settings.prompt_file} ({error}): name a readable text file") from error
    ids = load_tokenizer(checkpoint).encode(text)
    if not ids:
        raise UserError(f"--prompt-file {settings.prompt_file} is empty: write a text into it")
    tokens = tokens or len(ids) // batch
    if not 0 < batch * tokens <= len(ids):
        raise UserError(
            f"{settings.prompt_file} holds {len(ids)} tokens, {batch} prompts of {tokens or 'at least 1'} were asked for: give a "
            "longer file, or lower --prompt-tokens or --batch"
        )
    return [ids[i * tokens : (i + 1) * tokens] for i in range(batch)]


def _check(settings: Settings, checkpoint: Checkpoint, ladders: Sequence[str], context: int) -> None:
    """Plan every ladder, so that what cannot be is refused before any weights are read. Raises UserError as `LLM` does."""
    spec = spec_from_config(checkpoint.config)
    if context > spec.max_context:
        most = spec.max_context - settings.max_tokens
        raise UserError(
            f"prompts of {context - settings.max_tokens} tokens and {settings.max_tokens} new ones are more than the model's context "
            f"of {spec.max_context}: " + (f"give --prompt-tokens {most} or less" if most > 0 else "lower --max-tokens")
        )
    tokenizer, drafts, draft = None, {}, settings.draft
    if settings.shape is None:
        tokenizer = load_tokenizer(checkpoint)
    elif draft is not None and draft != "ngram":
        drafts[draft] = open_shape(draft)
    reads = settings.calibration is not None or beside(checkpoint.path) is not None
    fingerprint = checkpoint.source.fingerprint() if reads else ""
    for ladder in ladders:
        make_plan(Target(checkpoint, spec, fingerprint, tokenizer), _wish(settings, ladder, context), drafts)


def _wish(settings: Settings, ladder: str, context: int) -> Wish:
    drafts, budgets, densities, calibrations = settings.places(ladder)
    return Wish(
        ladder=ladder,
        draft=settings.draft if drafts else None,
        kv_budget=settings.kv_budget if budgets else None,
        density=settings.density if densities else None,
        calibration=settings.calibration if calibrations else None,
        verification=settings.verification,
        dtype=settings.dtype,
        device=settings.device,
        max_model_len=context,
        max_num_seqs=settings.batch,
    )


def _load(settings: Settings, ladder: str, context: int) -> LLM:
    options: dict[str, Any] = {**asdict(_wish(settings, ladder, context)), "prefix_cache": False, "progress": False}
    if settings.shape is not None:
        assert settings.rates is not None
        return ShapeLLM(settings.shape, rates=settings.rates, **options)
    assert settings.model is not None
    return LLM(settings.model, **options)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _generated(requests: Iterable[Request]) -> int:
    return sum(request.stats.generated_tokens for request in requests)


def _sum(several: Iterable[dict[str, RungCounts]]) -> dict[str, RungCounts]:
    """By rung, added up into new objects."""
    found: dict[str, RungCounts] = defaultdict(RungCounts)
    for rungs in several:
        for name, counts in rungs.items():
            found[name].add(counts)
    return found


def _summary(ladder: str, samples: Sequence[Sample], plain: Sequence[Sample], bandwidth: float) -> dict[str, Any]:
    """Medians of times and of the ratios within a round (above 1: faster than plain); counts of all rounds together."""
    tokens, rounds = sum(sample.tokens for sample in samples), sum(sample.rounds for sample in samples)
    counted = _sum(sample.rungs for sample in samples)
    names = Ladder.parse(ladder).names
    rungs = {name: counted[name] for name in names if name in counted}
    stats = RequestStats(prompt_tokens=0, round_tokens=tokens, rounds=rounds, rungs=rungs)
    bytes_read = sum(counts.bytes_read for counts in rungs.values()) / tokens
    each = median(sample.pace.s_per_token for sample in samples)
    return {
        "s_per_token": each,
        "later_s_per_token": median(sample.pace.later_s_per_token for sample in samples),
        "prefill_s": median(sample.prefill_s for sample in samples),
        "speedup": median(p.pace.s_per_token / s.pace.s_per_token for s, p in zip(samples, plain, strict=True)),
        "later_speedup": median(p.pace.later_s_per_token / s.pace.later_s_per_token for s, p in zip(samples, plain, strict=True)),
        "tokens_per_round": stats.tokens_per_round,
        "acceptance": stats.acceptance,
        "acceptance_by_position": stats.acceptance_by_position,
        "refreshes": {name: counts.refreshes for name, counts in rungs.items() if counts.refreshes},
        "time_s_per_token": {name: counts.seconds / tokens for name, counts in rungs.items()},
        "not_used": [name for name in names if name not in rungs],
        "run_per_token": {name: counts.tokens / tokens for name, counts in rungs.items()},
        "bytes_per_token": bytes_read,
        "floor_s_per_token": bytes_read / bandwidth,
        "floor_reached": bytes_read / bandwidth / each,
    }
