"""The case `kv` of `offload.py`: a long prompt's KV in host memory, plain decoding and TriForce's ladder with simulated acceptance."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from _figures import device_name, release
from _simulated import SimulatedLLM, skip_prompts
from offload_bus import all_rates, outside_bytes
from offload_cases import loaded, memory, places, profile
from offload_places import Budget, planned_bytes, with_kv_away

from rowcast import SamplingParams
from rowcast.bench.shapes import open_shape
from rowcast.cluster.distributed_comm import DistributedComm
from rowcast.placement.plan import Plan
from rowcast.placement.resident import rank_share
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.llm import LLM
from rowcast.runtime.request import Request
from rowcast.runtime.spec import kv_bytes_per_token

DRAFT = "random:llama-68m"
PLAIN_TOKENS, WARM_ROUNDS = 5, 8


@dataclass(frozen=True, slots=True)
class Wish:
    """What to run."""

    model: str
    prompt: int
    """Tokens."""
    real_prompt: bool
    cap_bytes: int
    """Of each GPU, by the driver's count."""
    gammas: tuple[int, int]
    """Of the draft and of the retrieval rung."""
    budget: int
    """Entries of the retrieval cache."""
    ranks: int
    outer: float
    inner: tuple[float, ...]
    """Simulated acceptances: by the last rung, and by the one below it, one after the other."""
    rounds: int
    """Timed, of each."""
    draft: str
    outside: int | None = None
    """As `Budget`'s."""
    profile: bool = False

    @property
    def ladder(self) -> str:
        """TriForce's."""
        inner, outer = self.gammas
        return f"draft:model={self.draft},kv=256,gamma={inner} / self:kv={self.budget},score=mean,gamma={outer} / plain"

    def placed(self, device: torch.device, ladder: str) -> tuple[Plan, Budget]:
        """What lies where, on GPUs or CPUs, within what budget."""
        most = self.prompt + PLAIN_TOKENS + len(self.inner) * (self.rounds + WARM_ROUNDS) * (self.gammas[1] + 2)
        budget = Budget(self.cap_bytes, 0.0, most, device.type, world=self.ranks, outside=self.outside)
        spec, draft = (spec_from_config(open_checkpoint(name).config) for name in (f"random:{self.model}", self.draft))
        return with_kv_away(spec, draft, budget, ladder), budget


def run(wish: Wish, device: torch.device, comm: DistributedComm | None) -> dict[str, Any]:
    """All ways; of several ranks each runs an engine of its own: all do the same."""
    rates = all_rates(device, comm)
    wish = replace(wish, outside=outside_bytes(device, comm))
    checkpoint = open_shape(wish.model, device=device)
    spec = spec_from_config(checkpoint.config)
    part = kv_bytes_per_token(rank_share(spec, wish.ranks), 2 if device.type == "cuda" else 4) * wish.prompt
    found: dict[str, Any] = {
        "model": wish.model,
        "gpu": device_name(device),
        "ranks": wish.ranks,
        "prompt": wish.prompt,
        "prompt_was_run": wish.real_prompt,
        "kv_bytes": part,
        "bus_rates": rates,
        "outside_bytes": wish.outside,
        "floor_s": part / min(rates),
    }
    ids = random.Random(1).choices(range(spec.vocab_size), k=wish.prompt)
    for name, ladder in (("plain", "plain"), ("triforce", wish.ladder)):
        started = time.perf_counter()
        plan, budget = wish.placed(device, ladder)
        plan = replace(plan, device=str(device), ceiling_bytes=wish.cap_bytes if device.type == "cuda" else 0)
        llm = SimulatedLLM(checkpoint, comm, plan=plan, tensor_parallel_size=wish.ranks, prefix_cache=False, progress=False)
        shown = {"load_s": time.perf_counter() - started, "ladder": ladder, "cap_bytes": wish.cap_bytes}
        shown |= {"planned_bytes": planned_bytes(plan, spec, budget), "places": places(plan), "loading_bytes": loaded(device)}
        if not wish.real_prompt:
            skip_prompts(llm)
        request, first_s = started_on(llm, ids)
        for rate in (0.0,) if ladder == "plain" else wish.inner:  # one request: its draft reads the prompt once
            llm.rates(wish.outer, rate)
            way = name if ladder == "plain" else f"{name} {rate}"
            one = timed(llm, request, PLAIN_TOKENS if ladder == "plain" else wish.rounds, wish.outer)
            found[way] = shown | {"first_token_s": first_s} | one | memory(llm, device)
            if comm is None or comm.leads:
                print(f"{way}: {found[way]}", file=sys.stderr, flush=True)
            if wish.profile and (rate == 0.0 or rate == wish.inner[-1]):
                profile(llm.engine.step)
        llm.engine.abort(request)
        llm.engine._executor.elsewhere.close()  # type: ignore[attr-defined]
        del llm
        release()
    return found


def started_on(llm: LLM, ids: list[int]) -> tuple[Request, float]:
    """A request that has its first token, and how long that took."""
    params = SamplingParams(temperature=0.8, seed=1, ignore_eos=True, detokenize=False)
    request = llm.engine.add(ids, replace(params, max_tokens=llm.plan.max_context - len(ids)))
    started = time.perf_counter()
    while not request.stats.generated_tokens:
        llm.engine.step()
    return request, time.perf_counter() - started


def timed(llm: LLM, request: Request, rounds: int, rate: float) -> dict[str, Any]:
    """So many rounds, after WARM_ROUNDS in which the draft reads the prompt, kernels are compiled and graphs captured, or one of plain
    decoding. A round's time is the median."""
    elsewhere, stats = llm.engine._executor.elsewhere, request.stats  # type: ignore[attr-defined]
    drafts = len(llm.plan.ladder) > 1
    elsewhere.counts()
    warm = WARM_ROUNDS if drafts else 1
    times, moved = [], []
    for number in range(warm + rounds):
        if number == warm:  # what follows is counted
            stats.rungs, stats.rounds, stats.round_tokens = {}, 0, 0
        began = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - began)
        moved.append(elsewhere.counts().kv.bytes)
    each = median(times[warm:])
    names = list(stats.rungs)
    proposed = stats.rungs[names[-2]].proposed if drafts and len(names) > 1 else []
    # Each proposal stands with the outer rate where all before it did.
    mean = 1 + sum(rate ** (place + 1) * count / rounds for place, count in enumerate(proposed))
    return {
        "s_per_token": each / mean,
        "s_per_token_as_run": sum(times[warm:]) / max(1, stats.round_tokens),
        "tokens_per_round": stats.round_tokens / rounds,
        "expected_tokens_per_round": mean,
        "gamma": Ladder.parse(llm.plan.ladder_text).rungs[-2].gamma if drafts else 0,
        "s_per_round": each,
        "rounds": rounds,
        "first_round_s": times[0],
        "kv_bytes_per_round": sum(moved[warm:]) / rounds,
        "acceptance": stats.acceptance,
        "rungs": {name: {"tokens": counts.tokens / rounds, "s": counts.seconds / rounds} for name, counts in stats.rungs.items()},
    }
