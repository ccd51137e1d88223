"""A plan put into effect: KV views, weights, rungs, and the executor that climbs them."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from rowcast.errors import OutOfMemoryError
from rowcast.kernels import gpu
from rowcast.offload.host_store import HostStore
from rowcast.placement.constants import STREAM_BYTES
from rowcast.placement.resident import MAX_BATCH_TOKENS, pass_bytes, rank_share, round_rows
from rowcast.placement.units import format_bytes
from rowcast.runtime import device as devices
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint import Checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.drafting import MakeRule, draft_view, max_position
from rowcast.runtime.executor import LastRung, LocalExecutor
from rowcast.runtime.gpu_ceiling import Ceiling
from rowcast.runtime.kv import ListedKV, PagedKV, Retrieval, SelectedKV, SharedKV, Summary
from rowcast.runtime.kv.hosted import HostedKV
from rowcast.runtime.kv.selection import policy
from rowcast.runtime.ladder.by_request import Choices
from rowcast.runtime.ladder.climb import Relay
from rowcast.runtime.ladder.control import Controller
from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.memory import kept_queries, lazy, summaries
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.ladder.ngram import NgramLookup
from rowcast.runtime.ladder.relay import Absent, FirstRelay
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.runner import Lookup, Runner
from rowcast.runtime.ladder.simulated import Simulated
from rowcast.runtime.ladder.spec import Ladder, Rung
from rowcast.runtime.lowbit_weights import LowBitWeights
from rowcast.runtime.offloaded.elsewhere import Elsewhere
from rowcast.runtime.offloaded.packed import OffloadedPacked, packed_view
from rowcast.runtime.offloaded.sizes import Buffers
from rowcast.runtime.offloaded.sparse import OffloadedSparse
from rowcast.runtime.offloaded.tiers import Tiers
from rowcast.runtime.offloaded.weights import OffloadedBanks
from rowcast.runtime.planning import Planned
from rowcast.runtime.progress import LoadProgress, Report
from rowcast.runtime.protocols import Comm, Decisions, KVView, RunsByLayer, WeightView
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.build import build_view
from rowcast.runtime.sparse.sizes import expected_bytes
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token, layer_parameters, parameter_count
from rowcast.runtime.weights import DenseWeights, Outer
from rowcast.settings import settings

if TYPE_CHECKING:
    from rowcast.runtime.device_round.rounds import DeviceRounds

log = logging.getLogger("rowcast")


def assemble(
    planned: Planned,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    make_rule: MakeRule,
    progress: bool | None,
    eager: bool = False,
    comm: Comm | None = None,
    decisions: Decisions | None = None,
    report: Report | None = None,
    driver_relay: Callable[[Sampler], Relay] | None = None,
) -> LocalExecutor:
    """The executor of a plan: reads the weights of `checkpoint` and of the drafts, allocates all caches.

    `driver_relay`: by which ranks hear of a draft with at=driver, which they do not load; needed where there is one.
    `eager`: a GPU's passes are launched one call at a time, not as captured graphs. `progress`: show a bar; None: if standard error is
    a terminal; `report` is told, too. `comm` (None: alone) says which rank's share of the model this is; drafts, which are small, are
    whole on every rank that runs them. Several ranks need `decisions`. Raises UserError for damaged weights, OutOfMemoryError where
    the device has less memory than the plan takes.
    """
    plan = planned.plan
    device, _ = devices.choose_device(plan.device)
    ceiling = Ceiling(device, plan)

    def loaded() -> LocalExecutor:
        executor = _Assembly(planned, spec, device, comm or SoloComm(), decisions).executor(
            checkpoint, make_rule, progress, eager, report, driver_relay
        )
        ceiling.check()
        executor.ceiling = ceiling
        return executor

    try:
        with devices.current(device):
            return loaded()
    except BaseException as error:
        ceiling.end()  # the error's trace holds it
        _let_go(error)
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError, RuntimeError)):
            raise
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        needed = format_bytes(plan.weight_bytes + plan.kv_bytes + plan.rung_bytes)
        raise OutOfMemoryError(
            f"{plan.device} ran out of memory while loading: the plan needs {needed} for weights and KV: free memory on it, lower "
            "--max-model-len or use a smaller model"
        ) from error


def _let_go(error: BaseException) -> None:
    """Of what was loaded so far: an error's trace would hold it, on the GPU and pinned, for as long as somebody looks at it."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


_WeightsKey = str | Rung | None
"""What rungs share weights by: a draft's name, a self's `weights`, None: all weights of the model."""


class _Assembly:
    """The views are made first: what is wrong with a rung is known before any weights are read."""

    def __init__(self, planned: Planned, spec: ModelSpec, device: torch.device, comm: Comm, decisions: Decisions | None) -> None:
        self._plan, self._ladder, self._drafts = planned.plan, planned.ladder, planned.drafts
        self._calibration, self._forms = planned.calibration, planned.forms
        self._comm, self._shard = comm, Shard(comm.rank, comm.world)
        self._decisions = decisions
        self._spec = spec
        self._device = device
        self._dtype = devices.DTYPES[planned.plan.dtype]
        self._tiers = Tiers.of(planned.plan, comm.rank, spec.num_layers)
        self._away: OffloadedBanks | OffloadedPacked | None = None
        self._full = self._store()
        self._views = {rung: self._view(rung) for rung in self._ladder.rungs if rung.kind != "ngram" and self._runs(rung)}
        self._others = Choices(planned.ladder).others

    def executor(
        self,
        checkpoint: Checkpoint,
        make_rule: MakeRule,
        progress: bool | None,
        eager: bool,
        report: Report | None,
        driver_relay: Callable[[Sampler], Relay] | None,
    ) -> LocalExecutor:
        ladder = self._ladder
        lookup = NgramLookup() if ladder.rungs[0].kind == "ngram" else None
        decoders = self._decoders(checkpoint, progress, report)
        lower: list[Runner | Lookup] = [lookup] if lookup else []
        for rung, name in list(zip(ladder.rungs, ladder.names, strict=True))[len(lower) : -1]:
            if rung in self._views:
                lower.append(self._runner(rung, name, decoders[_weights(rung)], self._views[rung]))
            else:
                slots = None if rung.kv is None else self._plan.speculating_seqs
                lower.append(Absent(name, slots=slots, max_position=max_position(rung, self._spec_of(rung))))
        top = self._runner(ladder.rungs[-1], ladder.names[-1], decoders[_weights(ladder.rungs[-1])], self._full)
        sampler = Sampler(self._spec.vocab_size, self._device)
        relays: dict[int, Relay] = {}
        for place, rung in enumerate(ladder.lower):
            if rung.at == "first":
                assert self._decisions is not None
                relays[place] = FirstRelay(self._decisions, sampler, self._device)
            elif rung.at == "driver":
                assert driver_relay is not None
                relays[place] = driver_relay(sampler)
        rule = make_rule(sampler)
        others = [
            LastRung(
                self._runner(last.rung, last.name, decoders[_weights(last.rung)], self._full),
                last.below,
                self._controller(Ladder((*ladder.rungs[: last.below], last.rung)), lookup),
            )
            for last in self._others
        ]
        return LocalExecutor(
            top,
            sampler,
            lower=lower,
            rule=rule,
            controller=self._controller(ladder, lookup),
            rounds=self._rounds(lower, top, sampler, rule, eager),
            decisions=self._decisions,
            elsewhere=self._elsewhere(),
            others=others,
            relays=relays,
        )

    def _controller(self, ladder: Ladder, lookup: NgramLookup | None) -> Controller | None:
        """Chooses the gammas of a ladder's lower rungs, if it has any."""
        if not ladder.lower:
            return None
        ratios = [self._cost_ratio(rung, ladder.rungs[-1]) for rung in ladder.lower]
        return Controller(ladder, adaptive=self._plan.adaptive, lookup=lookup, cost_ratios=ratios)

    def _runs(self, rung: Rung) -> bool:
        """Whether this rank runs it."""
        return rung.at == "ranks" or (rung.at == "first" and self._comm.rank == 0)

    def _elsewhere(self) -> Elsewhere | None:
        """What the views have in host memory."""
        kv = self._full if isinstance(self._full, HostedKV) else None
        return None if kv is None and self._away is None else Elsewhere(self._away, kv)

    def _rounds(
        self, lower: list[Runner | Lookup], top: ModelRunner, sampler: Sampler, rule: Rule, eager: bool
    ) -> DeviceRounds | None:
        """Rounds that the device runs by itself, where it can."""
        coupled, rates = (rule.rule, rule.rates) if isinstance(rule, Simulated) else (rule, None)
        can = gpu.serves(self._device) and settings().gpu_rounds
        if not can and self._comm.world == 1:
            return None
        if apart := [rung for rung in self._ladder.lower if rung.at != "ranks"]:
            log.info("rounds are driven by the host: %s does not run on every rank", apart[0])
            return None
        why, driven = None if can else "it has no GPU's kernels, or ROWCAST_GPU_ROUNDS is 0", False
        if can:
            from rowcast.runtime.device_round.rounds import DeviceRounds

            why = DeviceRounds.why_not(lower, top) if isinstance(coupled, Coupled) else "verification is maximal"
            driven = DeviceRounds.is_driven(lower, top)
        # All ranks ask: their environments may differ, and so may where they have their parts. All make the same passes.
        if self._comm.world > 1:
            others, drive = self._comm.exchange(torch.tensor([why is not None, driven], dtype=torch.int64)).any(0).tolist()
            why, driven = why or ("another rank's rows are chosen by the host" if others else None), bool(drive)
        if why is not None:
            log.info("rounds are driven by the host: %s", why)
            return None
        capture = self._device.type == "cuda" and not eager
        log.info("rounds run on the device, %s", "captured in graphs" if capture else "launched call by call")
        rows = round_rows(self._plan.max_num_seqs)
        return DeviceRounds(
            lower, top, sampler, lookahead=self._plan.lookahead, rows=rows, capture=capture, rates=rates, driven=driven
        )

    def _spec_of(self, rung: Rung) -> ModelSpec:
        return self._spec if rung.model is None else self._drafts[rung.model].spec

    def _decoders(self, checkpoint: Checkpoint, progress: bool | None, report: Report | None) -> dict[_WeightsKey, Decoder]:
        keys = {_weights(rung) for rung in self._views}
        sparse = [key for key in keys if isinstance(key, Rung) and key.sparse]
        low_bit = {key: key.bits for key in keys if isinstance(key, Rung) and key.bits is not None}
        # Dense passes on a CPU take a library's layout, which has no rows to choose; on a GPU they take the banks.
        on_gpu = self._device.type != "cpu" or gpu.serves(self._device) or self._tiers is not None
        packed = None in keys and self._forms is not None
        dense = None in keys and not on_gpu and not packed
        whole_view = BankWeights if on_gpu else DenseWeights
        width = self._dtype.itemsize
        share, solo = rank_share(self._spec, self._comm.world), SoloComm()
        drafts = {name: draft for name, draft in self._drafts.items() if name in keys}
        sizes = [parameter_count(draft.spec) for draft in drafts.values()] + [parameter_count(share)]
        if dense and sparse:
            sizes.append(share.num_layers * layer_parameters(share))
        if dense and low_bit and not sparse:
            sizes += [share.num_layers * layer_parameters(share)] * len(low_bit)
        views: dict[_WeightsKey, WeightView] = {}
        with LoadProgress(checkpoint.path.name, sum(sizes) * width, progress, report) as bar:
            how: dict[str, Any] = {"dtype": self._dtype, "device": self._device, "progress": bar.advance}
            for name, draft in drafts.items():
                views[name] = whole_view(draft.spec, draft.checkpoint.source, solo, **how)
            outer = banks = None
            if packed:
                assert self._forms is not None
                whole = views[None] = packed_view(self._spec, checkpoint.source, self._comm, self._forms, self._tiers, **how)
                self._away = whole if isinstance(whole, OffloadedPacked) else None
                outer = whole.outer
            if dense:
                dense_view = views[None] = DenseWeights(self._spec, checkpoint.source, self._comm, **how)
                outer = dense_view.outer
            if sparse or (None in keys and on_gpu and not packed):
                banks = self._banks(checkpoint, outer, how)
                views.setdefault(None, banks)
                sparse_view = OffloadedSparse if isinstance(banks, OffloadedBanks) else SparseWeights
                views |= {key: build_view(banks, key, self._calibration, sparse_view) for key in sparse}
                outer = banks.outer
            for key, bits in low_bit.items():
                if banks is not None and not isinstance(banks, OffloadedBanks):
                    views[key] = LowBitWeights.beside(banks, checkpoint.source, self._comm, bits, **how)
                    continue
                rounded = views[key] = LowBitWeights.load(self._spec, checkpoint.source, self._comm, bits, outer=outer, **how)
                outer = rounded.outer
        keys |= {_weights(last.rung) for last in self._others}  # whose weights are among those
        return {key: Decoder(views[key], solo if key in self._drafts else self._comm, self._device) for key in keys}

    def _banks(self, checkpoint: Checkpoint, outer: Outer | None, how: dict[str, Any]) -> BankWeights:
        """All weights of the model, each where the plan has it."""
        tiers = self._tiers
        if tiers is None or tiers.weights_resident:
            return BankWeights(self._spec, checkpoint.source, self._comm, outer=outer, **how)
        buffers = Buffers.of(self._plan, tiers, self._spec, self._calibration)
        self._away = OffloadedBanks(
            self._spec, checkpoint.source, self._comm, tiers, buffers, calibration=self._calibration, **how
        )
        return self._away

    def _runner(self, rung: Rung, name: str, decoder: Decoder, view: KVView) -> ModelRunner:
        tokens = self._plan.max_batch_tokens
        if not (isinstance(view, HostedKV) and view.by_layer and isinstance(decoder.weights, RunsByLayer)):
            tokens = min(tokens, MAX_BATCH_TOKENS) if self._tiers is not None else tokens
        return ModelRunner(
            name,
            decoder,
            view,
            max_batch_tokens=tokens,
            max_position=max_position(rung, decoder.spec),
        )

    def _cost_ratio(self, rung: Rung, last: Rung) -> float:
        """Bytes that a pass of the rung reads over those of a last rung's, halfway through the longest context."""
        if rung.kind == "ngram":
            return 0.0
        entries = self._plan.max_context // 2
        return self._bytes_read(rung, entries) / self._bytes_read(last, entries)

    def _bytes_read(self, rung: Rung, entries: int) -> int:
        spec, width = self._spec_of(rung), self._dtype.itemsize
        if rung.kind != "draft":
            spec = rank_share(spec, self._comm.world)
        packed = None if self._forms is None else self._forms.sizes(self._spec, width, self._comm.world)
        weights = expected_bytes(spec, rung, width, self._calibration, packed)
        if rung.kind == "draft":
            weights = pass_bytes(spec, width)
        return weights + min(entries, rung.kv or entries) * kv_bytes_per_token(spec, width)

    def _view(self, rung: Rung) -> KVView:
        if rung == self._ladder.rungs[-1]:
            return self._full
        if rung.kind == "draft":
            return draft_view(rung, self._spec_of(rung), self._plan, self._dtype, self._device)
        if rung.kv is None:
            alone = sum(lower.kind == "self" and lower.kv is None for lower in self._ladder.lower) == 1
            return SharedKV(self._full, lazy=alone and not isinstance(self._full, HostedKV))
        slots, room = self._plan.speculating_seqs, self._plan.lookahead + 1  # the pending token is one more
        if rung.retrieves and gpu.serves(self._device) and not isinstance(self._full, HostedKV):
            chosen = Retrieval(rung.score, rung.chunk)
            return ListedKV(
                self._full,
                chosen,
                budget=rung.kv,
                sinks=rung.sinks,
                recent=rung.recent,
                refresh=rung.refresh,
                slots=slots,
                rows=round_rows(self._plan.max_num_seqs),
                context=self._plan.max_context,
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

    def _store(self) -> PagedKV:
        """The last rung's view: all entries, each layer's where the plan has them."""
        ladder, spec, plan = self._ladder, self._spec, self._plan
        keep_queries, kinds = kept_queries(ladder), summaries(ladder)
        if self._tiers is None or not self._tiers.kv_away:
            return self._paged(spec, self._shard, keep_queries=keep_queries, summaries=kinds, lazy=lazy(ladder, spec))
        return HostedKV(
            spec,
            self._shard,
            away=self._tiers.kv_away,
            store=HostStore(self._device),
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            dtype=self._dtype,
            device=self._device,
            keep_queries=keep_queries,
            summaries=kinds,
            piece_bytes=STREAM_BYTES,
            part_tokens=min(plan.max_batch_tokens, MAX_BATCH_TOKENS),
        )

    def _paged(
        self, spec: ModelSpec, shard: Shard, *, keep_queries: int = 0, summaries: Collection[Summary] = (), lazy: bool = False
    ) -> PagedKV:
        return PagedKV(
            spec,
            shard,
            num_blocks=self._plan.num_blocks,
            block_size=self._plan.block_size,
            dtype=self._dtype,
            device=self._device,
            keep_queries=keep_queries,
            summaries=summaries,
            lazy=lazy,
        )


def _weights(rung: Rung) -> _WeightsKey:
    return rung.model if rung.kind == "draft" else rung.weights
