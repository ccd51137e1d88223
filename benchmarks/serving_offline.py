"""Requests with known answers: what `LLM.generate` gives for them, and whether a server's streams are the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exactness import difference  # Beside this file.

from rowcast import LLM, RequestOutput, SamplingParams
from rowcast.bench.serving_client import Outcome, Planned

TEXT = Path(__file__).parents[1] / "tests/data/news-from-nowhere.txt"
NEAR_TIE = 1e-4
"""Scores closer than this may swap places between two ways of summing in float32."""

SEEDED = 0.8
"""Temperature of every second request; the others are greedy."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    prompt: list[int]
    temperature: float
    seed: int
    max_tokens: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=self.max_tokens, ignore_eos=True)

    def planned(self, model: str, at_s: float = float("inf"), long: bool = False) -> Planned:
        """For a server; by default in a closed loop."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return Planned(body, at_s, len(self.prompt), long)


class Offline:
    """The model in this process, which says what right answers are."""

    def __init__(self, model: str, options: Sequence[str] = ()) -> None:
        """`options`: none yet that change answers: coupled verification gives the same tokens whatever drafts."""
        self.llm = LLM(model, ladder="plain", dtype="float32", progress=False)
        self.ids = self.llm.tokenizer.encode(TEXT.read_text())

    def jobs(self, count: int, prompt_tokens: tuple[int, int], max_tokens: tuple[int, int], seed: int = 0) -> list[Job]:
        """Prompts cut from a text; every second request greedy, the others seeded. The same ones each time."""
        rng = random.Random(seed)
        found = []
        for i in range(count):
            length = rng.randint(*prompt_tokens)
            start = rng.randrange(len(self.ids) - length)
            temperature = SEEDED if i % 2 else 0.0
            found.append(Job(self.ids[start : start + length], temperature, 1000 * seed + i, rng.randint(*max_tokens)))
        return found

    def answers(self, jobs: Sequence[Job]) -> list[RequestOutput]:
        return self.llm.generate([job.prompt for job in jobs], [job.params for job in jobs])

    def compare(self, jobs: Sequence[Job], outcomes: Sequence[Outcome], expected: Sequence[RequestOutput]) -> dict[str, Any]:
        """How many streams were lost, equal, excused by a near tie, or different; the first ones of the last two by name."""
        lost = [i for i, outcome in enumerate(outcomes) if outcome.error is not None]
        equal = 0
        excused: list[dict[str, Any]] = []
        different: list[dict[str, Any]] = []
        for i, (job, outcome, output) in enumerate(zip(jobs, outcomes, expected, strict=True)):
            if outcome.error is not None:
                continue
            ours, theirs = output.outputs[0].token_ids, outcome.token_ids
            if ours == theirs and output.outputs[0].text == outcome.text:
                equal += 1
                continue
            found: dict[str, Any] = {"request": i, "temperature": job.temperature, "tokens": len(theirs), "of": len(ours)}
            if len(ours) == len(theirs) and ours != theirs:
                at, gap = difference(self.llm, output, _as_output(output, theirs), job.temperature)
                found |= {"at": at, "gap": gap}
            (excused if abs(found.get("gap", 1.0)) < NEAR_TIE else different).append(found)
        return {
            "requests": len(jobs),
            "lost": len(lost),
            "lost_as": sorted({f"{outcomes[i].error}: {outcomes[i].message}" for i in lost})[:5],
            "equal": equal,
            "excused": len(excused),
            "different": len(different),
            "near_ties": excused[:20],
            "differences": different[:20],
        }


def _as_output(like: RequestOutput, ids: list[int]) -> RequestOutput:
    from copy import deepcopy

    found = deepcopy(like)
    found.outputs[0].token_ids = ids
    return found
