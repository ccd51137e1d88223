"""The peer of `rowcast bench speculation`: Transformers' assisted generation with the same draft."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from rowcast.bench.latency import load_peer, prepare_peer
from rowcast.bench.pace import Mark, pace
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.device import DTYPES

if TYPE_CHECKING:
    from rowcast.bench.speculation import Settings


class _Clock:
    """A streamer: notes when how many tokens were there. The first call brings the prompt."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def put(self, ids: torch.Tensor) -> None:
        before = self.marks[-1][1] if self.marks else -ids.numel()
        self.marks.append((time.perf_counter(), before + ids.numel()))

    def end(self) -> None:
        pass


def visit(settings: Settings, prompt: Sequence[int], *, dtype: str, device: str) -> dict[str, dict[str, Any]]:
    """Load both models, warm up, run `plain` and `assisted` once each.

    Decoding is timed from the first tokens on. The draft has read the prompt by then, which ours does later, on the clock.
    """
    assert settings.model is not None and settings.draft is not None
    opened = open_checkpoint(settings.model), open_checkpoint(settings.draft)
    prepare_peer(*opened)
    model, draft = (load_peer(checkpoint, DTYPES[dtype], device) for checkpoint in opened)
    for each in (model, draft):
        each.generation_config.eos_token_id = None  # As ours, it writes all tokens that were asked for.
        each.generation_config.pad_token_id = 0
    found = {}
    for name, options in (("plain", {}), ("assisted", {"assistant_model": draft})):
        _generate(model, prompt[:64], settings, 16, options)
        found[name] = _generate(model, prompt, settings, settings.max_tokens, options)
    return found


def _generate(model: Any, prompt: Sequence[int], settings: Settings, tokens: int, options: Mapping[str, Any]) -> dict[str, Any]:
    clock = _Clock()
    ids = torch.tensor([prompt], device=model.device)
    law = {"do_sample": True, "temperature": settings.temperature, "top_k": 0} if settings.temperature else {"do_sample": False}
    torch.manual_seed(settings.seed)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, use_cache=True, streamer=clock, **law, **options
    )
    written = clock.marks[1:]
    return {
        "ids": output[0, len(prompt) :].tolist(),
        **pace(written)._asdict(),
        "tokens_per_round": written[-1][1] / len(written),
    }


def summary(visits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians; both speedups are those of its own assisted generation over its own plain one, within a visit."""
    plain, assisted = visits["plain"], visits["assisted"]
    pairs = list(zip(plain, assisted, strict=True))
    return {
        "plain_s_per_token": median(one["s_per_token"] for one in plain),
        "s_per_token": median(one["s_per_token"] for one in assisted),
        "later_s_per_token": median(one["later_s_per_token"] for one in assisted),
        "speedup": median(p["s_per_token"] / a["s_per_token"] for p, a in pairs),
        "later_speedup": median(p["later_s_per_token"] / a["later_s_per_token"] for p, a in pairs),
        "tokens_per_round": median(one["tokens_per_round"] for one in assisted),
        "identical": all(p["ids"] == a["ids"] for p, a in pairs),
    }
