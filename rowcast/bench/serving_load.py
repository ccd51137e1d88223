"""Which requests a benchmark sends, and when: arrivals, lengths, prompts. Torch-free."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rowcast.bench.serving_client import Planned
from rowcast.errors import UserError

INFINITE = float("inf")

WORDS = (
    "The ship lay at anchor off the river's mouth while the tide went out, and nobody on board had much to do but look at the low "
    "shore, count the birds that stood on the mud and wonder what the morning would bring. A boy with a lantern came up the "
    "ladder, said that supper was on the table, that the cook had found three onions and half a cheese, and that the captain "
    "wished to be told at once if the wind turned. It did not turn. Towards midnight a light was seen in the marsh; it moved along "
    "the bank, stopped, went out, and was lit again further inland, where the old road runs between the willows to the mill."
)
"""Prompts without a text of the user's are drawn at random from its tokens: no prefix is shared, and tokenizers know its words."""

SAFE_IDS = 100
"""Every vocabulary has so many."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A range of tokens, both ends included, from which lengths are drawn evenly."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """From "64" or "8-64". Raises UserError."""
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= 1 << 24:
            raise UserError(f"{option} is {text!r:.40} but has to be a number of tokens or a range of them, as in 64 or 8-64")
        return cls(low, high)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def arrivals(count: int, rate: float, kind: Literal["poisson", "fixed"], rng: random.Random) -> list[float]:
    """Seconds after the start. `rate`: requests a second; inf: all at once."""
    if rate == INFINITE:
        return [0.0] * count
    if kind == "fixed":
        return [i / rate for i in range(count)]
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:count]


def prompts(lengths: Sequence[int], source: Sequence[int], *, running_text: bool, rng: random.Random) -> list[list[int]]:
    """Token ids of each length: cut from `source` at random places, or (not `running_text`) drawn one by one from it.

    Raises UserError for a text that is shorter than a prompt.
    """
    if not running_text:
        return [rng.choices(source, k=length) for length in lengths]
    if max(lengths) > len(source):
        raise UserError(
            f"the prompt file has {len(source)} tokens, a prompt has {max(lengths)}: give a longer text or shorter prompts"
        )
    starts = [rng.randrange(len(source) - length + 1) for length in lengths]
    return [list(source[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def plan(
    times: Sequence[float],
    source: Sequence[int],
    *,
    model: str,
    running_text: bool,
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    long_share: float,
    long_tokens: int,
    sampling: dict[str, Any],
    seed: int,
) -> list[Planned]:
    """A request for each arrival. `long_share` of them, at random places, have prompts of `long_tokens`.

    `sampling` goes into each body as it is; seeds count on from `seed`. The same arguments give the same requests.
    """
    rng = random.Random(seed)
    count = len(times)
    long = set(rng.sample(range(count), round(count * long_share)))
    lengths = [long_tokens if i in long else prompt_tokens.draw(rng) for i in range(count)]
    each = prompts(lengths, source, running_text=running_text, rng=rng)
    return [
        Planned(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens.draw(rng),
                "seed": seed + i,
                "stream": True,
                "stream_options": {"include_usage": True},
                **sampling,
            },
            at_s,
            prompt_tokens=len(prompt),
            long=i in long,
        )
        for i, (at_s, prompt) in enumerate(zip(times, each, strict=True))
    ]
