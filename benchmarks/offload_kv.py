"""The case `kv` of `offload.py`: a long prompt's KV in host memory, plain decoding and TriForce's ladder with simulated acceptance."""

from __future__ import annotations

import gc
import random
import sys
import time
from dataclasses import replace
from typing import Any, cast

import torch
from offload_places import with_kv_away
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.bench.shapes import open_shape
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import DTYPES
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.spec import kv_bytes_per_token

DRAFT = "random:llama-68m"
OUTER, INNER = 0.92, (0.4, 0.6, 0.8)
LAST = 64
"""Tokens of the prompt that are run in any case: those whose queries choose what a retrieval view shows."""


class SimulatedLLM(LLM):
    """Proposals stand at given rates, all verification done."""

    rule: Simulated

    def _rule(self, sampler: Sampler) -> Rule:
        self.rule = Simulated(super()._rule(sampler), {})
        return self.rule

    def rates(self, outer: float, inner: float) -> None:
        """By the last rung, and by each rung below it."""
        last = len(self.plan.ladder) - 1
        self.rule.rates = {**dict.fromkeys(range(last), inner), last: outer}


def run(
    model: str, device: torch.device, prompt: int, real_prompt: bool, cap_bytes: int, gammas: tuple[int, int], budget: int
) -> dict[str, Any]:
    checkpoint = open_shape(model, device=device)
    spec = spec_from_config(checkpoint.config)
    found: dict[str, Any] = {"model": model, "prompt": prompt, "prompt_was_run": real_prompt}
    ids = random.Random(1).choices(range(spec.vocab_size), k=prompt)
    inner, outer = gammas
    triforce = f"draft:model={DRAFT},kv=256,gamma={inner} / self:kv={budget},score=mean,gamma={outer} / plain"
    for name, ladder in (("plain", "plain"), ("triforce", triforce)):
        started = time.perf_counter()
        draft = spec_from_config(open_checkpoint(DRAFT).config)
        plan = with_kv_away(spec, draft, cap_bytes, device.type, ladder, prompt + 512)
        llm = SimulatedLLM(checkpoint, plan=plan, prefix_cache=False, progress=False)  # every time reads the prompt
        loaded_s = time.perf_counter() - started
        if not real_prompt:
            _skip_prompts(llm)
        shown = {"load_s": loaded_s, "ladder": ladder}
        if ladder == "plain":
            found[name] = shown | _timed(llm, ids, 5)
            print(f"{name}: {found[name]}", file=sys.stderr)
        else:
            llm.rates(OUTER, INNER[0])
            _timed(llm, ids[:1024], 40)  # compiles kernels
            for rate in INNER:
                llm.rates(OUTER, rate)
                found[f"{name} {rate}"] = shown | _timed(llm, ids, 64)
                print(f"{name} {rate}: {found[f'{name} {rate}']}", file=sys.stderr)
        llm.engine._executor.elsewhere.close()  # type: ignore[attr-defined]
        del llm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found["kv_bytes"] = kv_bytes_per_token(spec, 2) * prompt
    return found


def _timed(llm: LLM, ids: list[int], tokens: int) -> dict[str, Any]:
    elsewhere = llm.engine._executor.elsewhere  # type: ignore[attr-defined]
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=tokens, ignore_eos=True, detokenize=False)
    elsewhere.counts()
    started = time.perf_counter()
    times, gained, moved, metrics = [], [], [], None
    for chunk in llm.stream(ids, params):
        times.append(time.perf_counter() - started)
        gained.append(len(chunk.token_ids))
        moved.append(elsewhere.counts().kv.bytes)
        metrics = chunk.output.metrics if chunk.output is not None else None
    assert metrics is not None
    # The first round has a draft read the prompt; the last may be cut short.
    timed = slice(2, len(times) if len(llm.plan.ladder) == 1 else -1)
    took, tokens = times[timed][-1] - times[1], sum(gained[timed])
    gamma = Ladder.parse(llm.plan.ladder_text).rungs[-2].gamma if len(llm.plan.ladder) > 1 else 0
    assert isinstance(gamma, int)
    expected = (1 - OUTER ** (gamma + 1)) / (1 - OUTER)
    rungs = {name: {"tokens": c.tokens, "s": c.seconds} for name, c in metrics.rungs.items()}
    return {
        "s_per_token": took / tokens,
        "tokens_per_round": tokens / len(times[timed]),
        "expected_tokens_per_round": expected,
        "s_per_round": took / len(times[timed]),
        "rounds": len(times[timed]),
        "first_token_s": times[0],
        "first_round_s": times[1] - times[0],
        "kv_bytes_per_round": sum(moved[timed]) / len(times[timed]),
        "acceptance": metrics.acceptance,
        "rungs": rungs,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "host_bytes": elsewhere.host_bytes,
    }


def _skip_prompts(llm: LLM) -> None:
    """Run the last tokens of a prompt only; the entries of the others are what the memory held, zeros."""
    decoder, dtype = llm.engine._executor._top.decoder, DTYPES[llm.plan.dtype]  # type: ignore[attr-defined]
    real = decoder.run

    def shortened(steps: Any, kv: Any) -> Tensor:
        [step] = steps
        if len(step.tokens) <= LAST:
            return cast(Tensor, real(steps, kv))
        kv.bind(steps)
        hidden = torch.zeros(len(step.tokens), llm.spec.hidden_size, dtype=dtype, device=decoder.device)
        if step.start + len(step.tokens) >= step.prompt_length:
            first = step.start + len(step.tokens) - LAST
            hidden[-LAST:] = real([replace(step, tokens=step.tokens[-LAST:], start=first)], kv)
        return hidden

    decoder.run = shortened
