"""The engine: requests in, tokens out, one step at a time; an executor does the arithmetic. Torch-free."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import Plan
from rowcast.placement.units import format_bytes
from rowcast.runtime.dense import DenseReads
from rowcast.runtime.densities import Densities
from rowcast.runtime.detokenizer import Detokenizer
from rowcast.runtime.ladder.by_request import Choices, Chosen
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.metrics import EngineMetrics
from rowcast.runtime.offloaded.tiers import Tiers
from rowcast.runtime.outputs import FinishReason, Logprob, Logprobs, RequestStats
from rowcast.runtime.pace import Pace
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.prefill_limit import PrefillLimit
from rowcast.runtime.prefix_cache import written_by
from rowcast.runtime.request import Request, Sequence
from rowcast.runtime.scheduler import Scheduler
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import Executor, SeqResult, SeqSetup, SeqStep, StepLost, TokenLogprobs

MakeDetokenizer = Callable[[SamplingParams, Seq[int]], Detokenizer]
"""(params, prompt ids) -> one sample's detokenizer."""


class Engine:
    """Executes a plan for any number of requests, which join and leave between steps. Not thread-safe."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        executor: Executor,
        *,
        eos_ids: Seq[int] = (),
        seed: int = 0,
        make_detokenizer: MakeDetokenizer | None = None,
        token_text: Callable[[int], str] | None = None,
        prefix_cache: bool = True,
        prefill_limit: PrefillLimit | None = None,
    ) -> None:
        """`eos_ids` end a text unless the request ignores them; `seed` derives the seeds of requests that bring none. `prefix_cache`:
        sequences that begin with the same tokens share their K/V. `prefill_limit`: bounds prompts' part of a step; None: nothing does,
        so that all of them are through soonest.

        `make_detokenizer` is needed by requests that want text, `token_text` fills in logprobs' decoded tokens.
        """
        self.plan = plan
        self.spec = spec
        self._ladder = Ladder.parse(plan.ladder_text)
        self.choices = Choices(self._ladder)
        """What requests may ask for by `ladder` and `mode`."""
        self.scheduler = Scheduler(
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            max_batch_tokens=plan.max_batch_tokens,
            lookahead=plan.lookahead,
            written_by=written_by(self._ladder, spec) if prefix_cache else None,
            prefill_limit=prefill_limit,
            blocks_are_copied=any(
                tiers is not None and tiers.kv_away
                for tiers in (Tiers.of(plan, rank, spec.num_layers) for rank in range(plan.world))
            ),
        )
        self._prefill_limit = prefill_limit
        self.pace = Pace(self._ladder.names[-1])
        self.densities = Densities(spec.num_layers)
        """What the rungs used of each layer of late."""
        self._dense = DenseReads(plan, spec)
        self.metrics: EngineMetrics | None = None
        """What passes on what happens here; None: nothing does."""
        self._executor = executor
        self._eos_ids = list(eos_ids)
        self._seed = seed
        self._make_detokenizer = make_detokenizer
        self._token_text = token_text
        self._requests = 0
        self._sequences = 0
        self._live: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request that is still wanted is unfinished."""
        return any(not seq.request.dropped for seq in self._live.values())

    def add(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        bad_word_ids: list[list[int]] | None = None,
        ladder: str | None = None,
        mode: str | None = None,
    ) -> Request:
        """Queue a request. Raises UserError where the prompt or the parameters cannot be honoured, and changes nothing then.

        `ladder`: the rungs that may run for it, some of the engine's, in order, with a last one that decides; None: all. `mode`: exact
        or approximate, as far as the engine has a last rung for it without memory of its own (`choices`); None: the engine's. Where
        that is not the engine's own last rung, the host drives the rounds, on a GPU, too.

        Under the rule coupled, what a request with a `params.seed` gets depends on prompt, parameters, seed and last rung alone: not on
        the engine that runs it, nor on what else that runs.
        """
        chosen = self.choices.choose(ladder, mode)
        if params.truncate_prompt_tokens is not None:
            kept = params.truncate_prompt_tokens if params.truncate_prompt_tokens > 0 else self.plan.max_context - 1
            prompt_ids = prompt_ids[-kept:]
        max_length = self._max_length(prompt_ids, params)
        seed = params.seed if params.seed is not None else derived_seed(self._seed, self._requests)
        stats = RequestStats(
            prompt_tokens=len(prompt_ids),
            seed=seed,
            ladder=chosen.ladder,
            names=chosen.names,
            verification=self.plan.verification,
        )
        request = Request(f"{self._requests}", prompt, prompt_ids, params, seed, max_length, stats)
        request.cache_key = chosen.last or ""
        try:
            for sample_index in range(params.n):
                self._add_sample(request, sample_index, bad_word_ids or [], chosen)
        except BaseException:
            self.abort(request)
            raise
        self._requests += 1
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        return request

    def _add_sample(self, request: Request, sample_index: int, bad_word_ids: list[list[int]], chosen: Chosen) -> None:
        params = request.params
        detokenizer = None
        if params.detokenize and self._make_detokenizer is not None:
            detokenizer = self._make_detokenizer(params, request.prompt_ids)
        seq_id, self._sequences = self._sequences, self._sequences + 1
        eos_ids = [] if params.ignore_eos else self._eos_ids
        self._executor.add(
            SeqSetup(
                seq_id,
                params,
                request.seed,
                sample_index,
                request.prompt_ids,
                eos_ids,
                bad_word_ids,
                group=int(request.request_id),
                drafters=chosen.drafters,
                last=chosen.last,
            )
        )
        seq = Sequence(seq_id, sample_index, request, detokenizer)
        request.sequences.append(seq)
        self._live[seq_id] = seq
        self.scheduler.add(seq)

    def step(self) -> None:
        """Schedule, run, commit. Precondition: `has_work`. A lost step (`StepLost`) emits nothing, later ones make up for it."""
        started = time.perf_counter()
        self._reap()
        chosen, preempted = self.scheduler.schedule()
        for seq in preempted:
            self._executor.free_kv(seq.seq_id, seq.length)
            seq.request.stats.preemptions += 1
        steps = [self._command(seq, tokens) for seq, tokens in chosen]
        emitted: Counter[Request] = Counter()
        dense_bytes = 0
        try:
            results = self._executor.step(steps)
            for (seq, _), step, result in zip(chosen, steps, results, strict=True):
                gained = self._commit(seq, step, result)
                emitted[seq.request] += gained
                dense = self._dense.bytes(step.start + len(step.tokens), max(1, gained), len(steps))
                seq.request.stats.dense_bytes += dense
                dense_bytes += dense
        except StepLost:
            self._preempt_all()
            if self.metrics is not None:
                self.metrics.lost_step()
            return
        except BaseException:
            self._preempt_all()  # what the step left of the KV is unknown
            raise
        for request, tokens in emitted.items():
            if tokens:
                request.count(tokens)
            if request.finished and self._as_planned(request):
                self.pace.finished(request)
        seconds = time.perf_counter() - started
        if all(self._as_planned(seq.request) for seq, _ in chosen):
            self.pace.step(seconds, steps, results, emitted.total())
        if self._prefill_limit is not None:
            prompt_tokens = sum(len(step.tokens) for step in steps if not step.decodes)
            self._prefill_limit.observe(seconds, prompt_tokens, sum(step.decodes for step in steps))
        self.densities.step(results)
        if self.metrics is not None:
            self.metrics.step(self.scheduler, results, emitted.total(), len(preempted), dense_bytes, self.densities)
            for request in emitted:
                if request.finished:
                    self.metrics.ended(request)

    def abort(self, request: Request) -> None:
        """Drop what is left of a request; samples that have finished stay as they are."""
        if self.metrics is not None and not request.finished:
            self.metrics.ended(request, aborted=True)
        for seq in request.sequences:
            if seq.finish_reason is None:
                self._finish(seq, "abort")

    def check(self) -> None:
        """Nothing is leaked. For tests and idle moments."""
        self._reap()
        self.scheduler.check()
        self._executor.check(self._live.keys())
        if not self._live:
            assert self.scheduler.pool.free_blocks == self.scheduler.pool.total

    def _as_planned(self, request: Request) -> bool:
        """Whether the ladder's own last rung decides."""
        return request.stats.ladder.rungs[-1] is self._ladder.rungs[-1]

    def _reap(self) -> None:
        """Abort requests that were dropped. Garbage collection may drop one at any moment, in mid-step too, so it only marks it."""
        for request in {seq.request for seq in self._live.values() if seq.request.dropped}:
            self.abort(request)

    def _preempt_all(self) -> None:
        """After a failed step: every sequence is computed again from its tokens."""
        for seq in self.scheduler.preempt_all():
            self._executor.free_kv(seq.seq_id, seq.length)

    def _command(self, seq: Sequence, tokens: int) -> SeqStep:
        request = seq.request
        found = request.prompt_logprobs
        wanted = found is not None and seq.sample_index == 0 and len(found) < len(request.prompt_ids)
        return SeqStep(
            seq_id=seq.seq_id,
            tokens=seq.tokens(seq.computed, seq.computed + tokens),
            start=seq.computed,
            blocks=list(seq.blocks),
            prompt_length=len(request.prompt_ids),
            sample=tokens == seq.pending,
            prompt_logprobs=request.params.prompt_logprobs if wanted else None,
            room=self.scheduler.room(seq),
            left=request.max_length - seq.length,
            adopts=bool(seq.cached) and seq.computed == seq.cached,
        )

    def _commit(self, seq: Sequence, step: SeqStep, result: SeqResult) -> int:
        """Take over what a step gave one sequence, up to the first stop; the number of tokens."""
        request = seq.request
        request.stats.count(result.rungs, "host" if self.plan.device == "cpu" else "gpu")
        request.stats.count_moved(result.moved)
        if request.prompt_logprobs is not None and result.prompt_logprobs is not None:
            known = len(request.prompt_logprobs) - 1 - step.start  # from before a preemption
            request.prompt_logprobs += [self._logprobs(entry) for entry in result.prompt_logprobs[known:]]
        if not result.tokens:
            seq.computed += len(step.tokens)
            self.scheduler.filled(seq)
            return 0
        emitted = 0
        for i, token in enumerate(result.tokens):
            seq.output_ids.append(token)
            seq.computed = seq.length - 1  # all tokens but the newest have K/V
            emitted += 1
            if result.logprobs is not None:
                seq.logprobs.append(self._logprobs(result.logprobs[i]))
                seq.cumulative_logprob += result.logprobs[i].logprob
            if self._stops(seq, token):
                break
        else:
            self.scheduler.filled(seq)
        if step.decodes:
            request.stats.rounds += 1
            request.stats.round_tokens += emitted
        return emitted

    def _stops(self, seq: Sequence, token: int) -> bool:
        """Whether the newest token ends the sequence; if so, ends it."""
        params, generated = seq.request.params, len(seq.output_ids)
        is_eos = token in self._eos_ids and not params.ignore_eos
        is_stop = token in (params.stop_token_ids or ())
        honoured = generated >= params.min_tokens
        if honoured and (is_eos or is_stop):
            if seq.detokenizer is not None and params.include_stop_str_in_output:
                seq.detokenizer.push(token, check_stop=False)
            self._finish(seq, "stop", None if is_eos else token)
            return True
        if seq.detokenizer is not None:
            match = seq.detokenizer.push(token, check_stop=generated > params.min_tokens)
            if match is not None:
                self._finish(seq, "stop", match.stop)
                return True
        if seq.length >= seq.request.max_length:
            self._finish(seq, "length")
            return True
        return False

    def _finish(self, seq: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        if seq.detokenizer is not None:
            seq.detokenizer.finish()
        self.scheduler.remove(seq)
        self._executor.remove(seq.seq_id)
        del self._live[seq.seq_id]

    def _max_length(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Length at which the request ends, once it is known to fit."""
        prompt, context, vocabulary = len(prompt_ids), self.plan.max_context, self.spec.vocab_size
        if not prompt:
            raise UserError("the prompt has no tokens: give at least one")
        for token in prompt_ids:
            if not 0 <= token < vocabulary:
                raise UserError(f"prompt token id {token} is outside the vocabulary, 0 to {vocabulary - 1}")
        if prompt >= context:
            raise UserError(
                f"the prompt has {prompt} tokens, but the context is {context} and one token has to be generated: shorten the "
                f"prompt to {context - 1} tokens"
                + (" or raise max_model_len" if context < self.spec.max_context else " or use a model with a longer context")
            )
        length = min(context, prompt + params.max_tokens) if params.max_tokens is not None else context
        if length - 1 > self.plan.kv_tokens:
            raise OutOfMemoryError(
                f"a request of {prompt} prompt and {length - prompt} new tokens needs KV memory of "
                f"{format_bytes(length * self.plan.kv_token_bytes)}, there are {format_bytes(self.plan.kv_bytes)} "
                f"({self.plan.kv_tokens} tokens): shorten it or raise the memory budget"
            )
        return length

    def _logprobs(self, entry: TokenLogprobs) -> Logprobs:
        text = self._token_text or _no_text
        found = {
            token: Logprob(value, rank, text(token))
            for rank, (token, value) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
        }
        return {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id)), **found}


def derived_seed(seed: int, number: int) -> int:
    """For a request that brings none: made of the engine's seed and the request's number, far from seeds that people choose."""
    return (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) % (1 << 63)


def _no_text(_: int) -> None:
    return None
