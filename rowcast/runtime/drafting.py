"""Drafts put into effect: their KV, and the rungs up to a draft where no rank of the plan is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rowcast.kernels import gpu
from rowcast.placement.plan import Plan
from rowcast.placement.resident import LOGIT_ELEMENTS
from rowcast.runtime import device as devices
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV, StreamingKV
from rowcast.runtime.ladder.climb import Climb
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.planning import Planned
from rowcast.runtime.protocols import KVView
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import DenseWeights

MakeRule = Callable[[Sampler], Rule]


def draft_view(rung: Rung, spec: ModelSpec, plan: Plan, dtype: torch.dtype, device: torch.device) -> KVView:
    """A draft's own KV, `spec` its shape: all of it, in blocks as the target's, or a stream for each of some sequences."""
    if rung.kv is None:
        return PagedKV(spec, Shard(), num_blocks=plan.num_blocks, block_size=plan.block_size, dtype=dtype, device=device)
    return StreamingKV(
        spec,
        Shard(),
        budget=rung.kv,
        sinks=rung.sinks,
        slots=plan.speculating_seqs,
        room=plan.lookahead + 1,  # the pending token is one more
        dtype=dtype,
        device=device,
    )


def draft_climb(planned: Planned, sampler: Sampler, make_rule: MakeRule, device: torch.device) -> Climb:
    """The ladder's rungs up to the draft with at=driver, which there is, where no rank of the plan is. Reads the draft's weights.
    Raises UserError for damaged ones."""
    ladder = planned.ladder
    top = next(place for place, rung in enumerate(ladder.lower) if rung.at == "driver")
    lower = [
        NgramLookup() if rung.kind == "ngram" else _draft_runner(planned, rung, name, device)
        for rung, name in zip(ladder.rungs[: top + 1], ladder.names, strict=False)
    ]
    return Climb(lower, make_rule(sampler), logit_rows=max(1, LOGIT_ELEMENTS // sampler.vocab_size))


def _draft_runner(planned: Planned, rung: Rung, name: str, device: torch.device) -> ModelRunner:
    assert rung.model is not None
    plan, draft = planned.plan, planned.drafts[rung.model]
    dtype = devices.DTYPES[plan.dtype]
    whole_view = BankWeights if device.type != "cpu" or gpu.serves(device) else DenseWeights
    weights = whole_view(draft.spec, draft.checkpoint.source, SoloComm(), dtype=dtype, device=device)
    return ModelRunner(
        name,
        Decoder(weights, SoloComm(), device),
        draft_view(rung, draft.spec, plan, dtype, device),
        max_batch_tokens=plan.max_batch_tokens,
        max_position=max_position(rung, draft.spec),
    )


def max_position(rung: Rung, spec: ModelSpec) -> int | None:
    """Where a rung's positions end. In a draft's streaming cache they are relative: none is further away than the cache is long."""
    return None if rung.kind == "draft" and rung.kv is not None else spec.max_context
