"""The driver API: a model, its tokenizer and an engine in this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from rowcast.errors import UserError
from rowcast.placement.plan import Plan
from rowcast.placement.report import PlanReport
from rowcast.runtime.assembly import assemble
from rowcast.runtime.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.detokenizer import Detokenizer
from rowcast.runtime.engine import Engine, MakeDetokenizer
from rowcast.runtime.ladder.coupled import Coupled
from rowcast.runtime.ladder.maximal import Maximal
from rowcast.runtime.ladder.rule import Rule
from rowcast.runtime.ladder.spec import Ladder
from rowcast.runtime.outputs import RequestOutput
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.plan_report import plan_report
from rowcast.runtime.planning import Planned, Target, Wish, check_plan, make_plan
from rowcast.runtime.prefill_limit import prefill_limit
from rowcast.runtime.prompts import Prompt, each_prompt
from rowcast.runtime.request import Request
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import Executor
from rowcast.runtime.stream import Stream
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer
from rowcast.settings import configure_logging, settings

log = logging.getLogger("rowcast")

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""


class LLM:
    """A language model ready to generate. Not thread-safe: one thread calls it, and batches are for running requests together.

    >>> llm = LLM("SmolLM2-135M-Instruct")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(
        self,
        model: str | Path | Checkpoint = DEFAULT_MODEL,
        *,
        tensor_parallel_size: int = 1,
        ladder: str | Ladder = "auto",
        draft: str | Path | Checkpoint | None = None,
        kv_budget: int | None = None,
        verification: str = "coupled",
        mode: str = "exact",
        density: float | None = None,
        calibration: str | Path | None = None,
        dtype: str = "auto",
        weights: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        host_memory: str | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        prefix_cache: bool = True,
        max_num_prefill_tokens: int | None = None,
        prefill_stall_s: float | None = None,
        seed: int = 0,
        plan: Plan | str | Path | None = None,
        eager: bool = False,
        progress: bool | None = None,
    ) -> None:
        """Load a model.

        `model`: a directory with safetensors, a GGUF file, a hub id, "random:NAME" (the shape of a well-known model, or of a
        config file, with random weights and no tokenizer, for timing), or a checkpoint that was opened. `tensor_parallel_size`:
        ranks that share its weights, with a plan the plan's; this class is one, `rowcast.LLM` any number. `ladder`: who drafts
        for it; a preset (auto, plain, ngram, triforce, dejavu, hire), a text such as "ngram / self:kv=512 / plain", or a Ladder.
        `mode`: "exact": the ladder ends in `plain`, whose law the output has whatever drafts; "approximate": it ends in a sparse
        or low-bit rung, whose law the output has; its quality is told on standard error as far as it was measured. `density`:
        share of the neurons that the sparse rung of dejavu, hire and auto uses. `calibration`: a folder that `rowcast calibrate`
        wrote for this model; it has the predictors of dejavu and lowrank and those of heads, says how many neurons each layer
        keeps and, unless `density` does, how many on average, how many candidates hire ranks again, and which scorer a rung
        without `by` has: the one that it measured the best acceptance of. `draft`: a smaller model with the same vocabulary,
        named as `model` is, or "ngram". `kv_budget`: KV entries that the rung self of auto and triforce reads. `verification`:
        "coupled" gives the tokens of plain decoding at the same seed; "maximal" tokens of the same law, more of them drafted
        ones, but which they are depends on batch, memory and timing, too. `weights`: how a quantised checkpoint's (GPTQ, AWQ,
        compressed-tensors, GGUF) are held: "packed", in the few bits that it has them in, which a pass then reads; "unpacked", in
        the number format of a pass; "auto": packed on a GPU; on a CPU, and of a GGUF file, where memory is short. `gpu_memory`
        ("24GiB" or bytes) is the most that a process takes of its GPU by the driver's count, context, libraries and graphs
        included, so that a larger card stands in for a smaller one; what does not fit lies in host memory. `host_memory` is a
        budget for weights, KV and work space; libraries and the interpreter come on top. A model that fits on the GPU needs host
        memory for one tensor at a time. `max_model_len`: longest sequence in tokens, prompt and output together (the model's
        own). `max_num_seqs`: sequences that run at the same time (64). `max_num_batched_tokens`: tokens in one step (2048);
        longer prompts are prefilled in chunks. `block_size`: tokens in a KV block (16). `prefix_cache`: requests that begin with
        the same tokens share their K/V, those that have ended included, as long as no other needs the memory; a request that
        wants a prompt's log-probabilities runs it all. `max_num_prefill_tokens`: tokens of prompts in a step in which others
        generate. `prefill_stall_s`: as many as prolong such a step by about so many seconds, by how fast prompts were run lately.
        With either, a short prompt does not wait for a long one; without, prompts have whatever `max_num_batched_tokens` leaves,
        so that all of them are through soonest, as suits a list that is given at once. `seed` derives the seeds of requests that
        name none. `plan`: a plan or a plan file; it decides all that is named before these four but where the calibration lies,
        so none of it may be given with a plan. `eager`: launch a GPU's passes call by call and not as captured graphs, with the
        same output. `progress`: show a bar on standard error while loading; None: if that is a terminal.

        Raises UserError (a ValueError) in one sentence for anything that cannot be, OutOfMemoryError where memory is short.
        """
        started = time.perf_counter()
        limits = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
        }
        texts: dict[str, object] = {
            "verification": verification,
            "mode": mode,
            "dtype": dtype,
            "weights": weights,
            "device": device,
        }
        _check_types(texts, {**limits, "kv_budget": kv_budget, "seed": seed})
        self._check_ranks(tensor_parallel_size)
        for name, value in (("eager", eager), ("prefix_cache", prefix_cache)):
            if not isinstance(value, bool):
                raise UserError(f"{name}={value!r:.60} has to be True or False")
        self._sharing = prefix_cache, prefill_limit(max_num_prefill_tokens, prefill_stall_s)
        if "ROWCAST_LOG" in os.environ:
            configure_logging()
        threads = settings().threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.checkpoint: Checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(_text("model", model))
        self.spec: ModelSpec = spec_from_config(self.checkpoint.config)
        self._tokenizer: Tokenizer | str
        """Or why there is none."""
        try:
            self._tokenizer = load_tokenizer(self.checkpoint)
        except UserError as error:  # Token ids do without; whoever needs text gets the error.
            self._tokenizer = str(error).removesuffix(".")
        opened = {str(draft.path): draft} if isinstance(draft, Checkpoint) else {}
        wish = Wish(
            ladder=ladder if isinstance(ladder, Ladder) else _text("ladder", ladder),
            draft=None if draft is None else next(iter(opened), None) or _text("draft", draft),
            kv_budget=kv_budget,
            verification=verification,
            mode=mode,
            density=density,
            calibration=None if calibration is None else _text("calibration", calibration),
            dtype=dtype,
            weights=weights,
            device=device,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            tensor_parallel_size=tensor_parallel_size,
            **limits,
        )
        target = Target(
            self.checkpoint,
            self.spec,
            self.checkpoint.source.fingerprint(),
            None if isinstance(self._tokenizer, str) else self._tokenizer,
            None if isinstance(model, Checkpoint) else str(model),
        )
        planned = make_plan(target, wish, opened) if plan is None else check_plan(plan, target, wish, opened)
        self.plan: Plan = planned.plan
        for note in self.plan.notes:
            log.info("%s", note)
        log.info("plan: %s", self.plan.summary())
        if planned.quality is not None:
            log.warning("%s", planned.quality)
        self.engine = self._engine(planned, seed, progress, eager)
        self.load_stats = {
            "seconds": time.perf_counter() - started,
            "weight_bytes": self.plan.weight_bytes + self.plan.rung_weight_bytes,
        }

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError if it has none that can be used."""
        if isinstance(self._tokenizer, str):
            raise UserError(self._tokenizer)
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete prompts: text, token ids, or lists of them; one SamplingParams for all or one each. Results in input order."""
        return list(self.iterate(prompts, sampling_params))

    def iterate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """`generate`, one result at a time: each as soon as it and those before it are finished. All prompts run together.

        Nothing happens before the first result is asked for; dropping the iterator cancels what is left.
        """
        each = each_prompt(prompts)
        params = each_params(sampling_params, len(each))
        requests: list[Request] = []
        try:
            for i, (prompt, param) in enumerate(zip(each, params, strict=True), start=1):
                try:
                    requests.append(self._add(prompt, param))
                except UserError as error:
                    if len(each) == 1:
                        raise
                    raise type(error)(f"prompt {i} of {len(each)}: {error}") from error
            for request in requests:
                while not request.finished:
                    self.engine.step()
                yield request.output()
        finally:
            for request in requests:
                self.engine.abort(request)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Complete one prompt and yield text as soon as it is final. The last chunk carries the whole `output`.

        Bad input raises here, not at the first chunk. Closing or dropping the stream cancels the request.
        """
        each = each_prompt(prompt)
        if len(each) != 1:
            raise UserError(f"a stream has one prompt, not {len(each)}: call stream for each, or generate")
        [params] = each_params(sampling_params, 1)
        return Stream(self.engine, self._add(each[0], params))

    def chat(
        self, messages: Seq[Message] | Seq[Seq[Message]], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's own chat template."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        return self.generate([self.tokenizer.chat(conversation) for conversation in conversations], sampling_params)  # type: ignore[arg-type]

    def stream_chat(self, messages: Seq[Message], sampling_params: SamplingParams | None = None) -> Stream:
        """`chat` for one conversation, streamed."""
        return self.stream(self.tokenizer.chat(messages), sampling_params)

    def plan_report(self, *, remember: bool = False) -> PlanReport | None:
        """What the plan foretold beside what was measured since the model was loaded; None for a plan that foretells nothing, and
        before anything was generated. `remember`: keep what a plan for this machine was off by, for the next `rowcast plan`."""
        return plan_report(self.engine, remember=remember)

    def _engine(self, planned: Planned, seed: int, progress: bool | None, eager: bool) -> Engine:
        return Engine(
            planned.plan,
            self.spec,
            self._executor(planned, progress, eager),
            eos_ids=self._eos_ids(),
            seed=seed,
            make_detokenizer=_detokenizers(self._tokenizer),
            token_text=None if isinstance(self._tokenizer, str) else self._tokenizer.token,
            prefix_cache=self._sharing[0],
            prefill_limit=self._sharing[1],
        )

    def _check_ranks(self, tensor_parallel_size: int) -> None:
        """Raise UserError for a number of ranks that `_executor` cannot run."""
        if tensor_parallel_size != 1:
            raise UserError(
                f"tensor_parallel_size={tensor_parallel_size} is not to be had: this class runs in one process, use rowcast.LLM"
            )

    def _executor(self, planned: Planned, progress: bool | None, eager: bool) -> Executor:
        """What runs the engine's steps: here, this process."""
        return assemble(planned, self.checkpoint, self.spec, make_rule=self._rule, progress=progress, eager=eager)

    def _rule(self, sampler: Sampler) -> Rule:
        """The rule by which proposals stand."""
        return Maximal(sampler) if self.plan.verification == "maximal" else Coupled(sampler)

    def _eos_ids(self) -> list[int]:
        """Tokens that end a text: those of the generation config, else of the config, and the tokenizer's own."""
        found = self.checkpoint.generation_config.get("eos_token_id")
        if found is None:
            found = self.checkpoint.config.get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.spec.vocab_size:
                raise UserError(
                    f"eos_token_id is {found!r:.60} in the model's config, but it has to be one or more token ids from 0 to "
                    f"{self.spec.vocab_size - 1}: correct generation_config.json or config.json"
                )
        if not isinstance(self._tokenizer, str) and self._tokenizer.eos_token_id is not None:
            ids = [*ids, self._tokenizer.eos_token_id]
        return list(dict.fromkeys(ids))

    def _add(
        self, prompt: str | list[int], params: SamplingParams, *, ladder: str | None = None, mode: str | None = None
    ) -> Request:
        """Queue a request; `ladder` and `mode` as in `Engine.add`. Raises UserError."""
        if isinstance(prompt, str) and isinstance(self._tokenizer, str):
            raise UserError(f"{self._tokenizer}, or pass prompts as token ids")
        text, ids = (prompt, self.tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
        bad_words = [ids for word in params.bad_words or () for ids in self._bad_word_ids(word)]
        return self.engine.add(ids, params, prompt=text, bad_word_ids=bad_words, ladder=ladder, mode=mode)

    def _bad_word_ids(self, word: str) -> list[list[int]]:
        """A bad word is forbidden at the start of a text and after a space."""
        found: list[list[int]] = []
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids not in found:
                found.append(ids)
        return found


def each_params(params: object, count: int) -> list[SamplingParams]:
    """One SamplingParams for all prompts, or one for each."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Seq) or not all(isinstance(p, SamplingParams) for p in params):
        raise UserError(f"sampling_params are {params!r:.60}: give SamplingParams(...), or a list with one for each prompt")
    if len(params) != count:
        raise UserError(f"{len(params)} SamplingParams were given for {count} prompts: give one, or one for each prompt")
    return list(params)


def _detokenizers(tokenizer: Tokenizer | str) -> MakeDetokenizer:
    """Makes detokenizers, or says why there can be none. Knows the tokenizer only, so that an LLM is freed when it is dropped."""

    def make(params: SamplingParams, prompt_ids: Seq[int]) -> Detokenizer:
        if isinstance(tokenizer, str):
            raise UserError(f"{tokenizer}, or ask for token ids alone, by SamplingParams(detokenize=False)")
        return Detokenizer(
            tokenizer,
            stop=params.stop_strings,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt_ids=prompt_ids,
        )

    return make


def _check_types(texts: Mapping[str, object], numbers: Mapping[str, object]) -> None:
    for name, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f"{name}={value!r:.60} has to be text")
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise UserError(f"{name}={value!r:.60} has to be a whole number")


def _text(name: str, value: object) -> str:
    if isinstance(value, (str, Path)):
        return str(value)
    raise UserError(f"{name}={value!r:.60} has to be text")
