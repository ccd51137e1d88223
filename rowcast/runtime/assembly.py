"""A plan put into effect: KV views, weights, rungs, and the executor that climbs them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from rowcast.errors import OutOfMemoryError
from rowcast.placement.resident import pass_bytes
from rowcast.placement.units import format_bytes
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.kv import PagedKV, SelectedKV, StreamingKV, Summary
from rowcast.runtime.ladder.control import Controller
from rowcast.runtime.ladder.memory import kept_queries, policy, summaries
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.runner import Lookup, Runner
from rowcast.runtime.ladder.spec import Rung
from rowcast.runtime.model import load_decoder
from rowcast.runtime.planning import Planned
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.protocols import KVView
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, parameter_count

MakeRule = Callable[[Sampler], Rule]


def assemble(
    planned: Planned, checkpoint: Checkpoint, spec: ModelSpec, *, make_rule: MakeRule, progress: bool | None
) -> LocalExecutor:
    """The executor of a plan: reads the weights of `checkpoint` and of the drafts, allocates all caches.

    `progress`: show a bar; None: if standard error is a terminal. Raises UserError for damaged weights, OutOfMemoryError where the
    device has less memory than the plan takes.
    """
    plan = planned.plan
    device, _ = devices.choose_device(plan.device)
    devices.hold_to_budget(device, plan.budget_bytes)
    try:
        return _Assembly(planned, spec, device).executor(checkpoint, make_rule, progress)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        needed = format_bytes(plan.weight_bytes + plan.kv_bytes + plan.rung_bytes)
        raise OutOfMemoryError(
            f"{plan.device} ran out of memory while loading: the plan needs {needed} for weights and KV: free memory on it, lower "
            "--max-model-len or use a smaller model"
        ) from error


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a rung runs. Rungs whose weights are equal share a decoder."""

    model: str | None
    """A draft's name; the target has none."""
    spec: ModelSpec
    pass_bytes: int
    """Read in one pass."""


class _Assembly:
    """The views are made first: what is wrong with a rung is known before any weights are read."""

    def __init__(self, planned: Planned, spec: ModelSpec, device: torch.device) -> None:
        self._plan, self._ladder, self._drafts = planned.plan, planned.ladder, planned.drafts
        self._spec = spec
        self._device = device
        self._dtype = devices.DTYPES[planned.plan.dtype]
        self._full = self._paged(spec, keep_queries=kept_queries(self._ladder), summaries=summaries(self._ladder))
        self._views = {rung: self._view(rung) for rung in self._ladder.rungs if rung.kind != "ngram"}

    def executor(self, checkpoint: Checkpoint, make_rule: MakeRule, progress: bool | None) -> LocalExecutor:
        ladder = self._ladder
        lookup = NgramLookup() if ladder.rungs[0].kind == "ngram" else None
        decoders = self._decoders(checkpoint, progress)
        runners = [
            self._runner(rung, name, decoders[self._weights(rung)])
            for rung, name in zip(ladder.rungs, ladder.names, strict=True)
            if rung in self._views
        ]
        lower: list[Runner | Lookup] = [*([lookup] if lookup else []), *runners[:-1]]
        sampler = Sampler(self._spec.vocab_size, self._device)
        controller = Controller(
            ladder, adaptive=self._plan.adaptive, lookup=lookup, cost_ratios=[self._cost_ratio(rung) for rung in ladder.lower]
        )
        return LocalExecutor(runners[-1], sampler, lower=lower, rule=make_rule(sampler), controller=controller if lower else None)

    def _weights(self, rung: Rung) -> _Weights:
        spec = self._spec if rung.model is None else self._drafts[rung.model].spec
        return _Weights(rung.model, spec, pass_bytes(spec, self._dtype.itemsize))

    def _decoders(self, checkpoint: Checkpoint, progress: bool | None) -> dict[_Weights, Decoder]:
        wanted = {self._weights(rung) for rung in self._views}
        total = sum(parameter_count(weights.spec) * self._dtype.itemsize for weights in wanted)
        with LoadProgress(checkpoint.path.name, total, progress) as bar:
            return {
                weights: load_decoder(
                    weights.spec,
                    (checkpoint if weights.model is None else self._drafts[weights.model].checkpoint).source,
                    dtype=self._dtype,
                    device=self._device,
                    progress=bar.advance,
                )
                for weights in wanted
            }

    def _runner(self, rung: Rung, name: str, decoder: Decoder) -> ModelRunner:
        weights = self._weights(rung)
        # Positions in a draft's streaming cache are relative: none is further away than the cache is long.
        unbounded = rung.kind == "draft" and rung.kv is not None
        return ModelRunner(
            name,
            decoder,
            self._views[rung],
            pass_bytes=weights.pass_bytes,
            max_batch_tokens=self._plan.max_batch_tokens,
            max_position=None if unbounded else weights.spec.max_context,
        )

    def _cost_ratio(self, rung: Rung) -> float:
        """Bytes that a pass of the rung reads over those of the last rung's, halfway through the longest context."""
        if rung not in self._views:
            return 0.0
        entries = self._plan.max_context // 2
        return self._bytes_read(rung, entries) / self._bytes_read(self._ladder.rungs[-1], entries)

    def _bytes_read(self, rung: Rung, entries: int) -> int:
        weights = self._weights(rung)
        entry = kv_bytes_per_token(weights.spec, self._dtype.itemsize)
        return weights.pass_bytes + min(entries, rung.kv or entries) * entry

    def _view(self, rung: Rung) -> KVView:
        if rung.kind == "plain":
            return self._full
        spec = self._weights(rung).spec
        if rung.kv is None:
            return self._paged(spec)
        slots, room = self._plan.speculating_seqs, self._plan.lookahead + 1  # the pending token is one more
        if rung.kind == "draft":
            return StreamingKV(
                spec,
                Shard(),
                budget=rung.kv,
                sinks=rung.sinks,
                slots=slots,
                room=room,
                dtype=self._dtype,
                device=self._device,
            )
        return SelectedKV(
            self._full,
            policy(rung),
            budget=rung.kv,
            sinks=rung.sinks,
            recent=1 if rung.view == "streaming" else rung.recent,
            refresh=rung.refresh,
            slots=slots,
            room=room,
        )

    def _paged(self, spec: ModelSpec, *, keep_queries: int = 0, summaries: Collection[Summary] = ()) -> PagedKV:
        return PagedKV(
            spec,
            Shard(),
            num_blocks=self._plan.num_blocks,
            block_size=self._plan.block_size,
            dtype=self._dtype,
            device=self._device,
            keep_queries=keep_queries,
            summaries=summaries,
        )
