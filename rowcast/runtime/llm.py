"""The driver API: a model, its tokenizer and an engine in this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.kernels.linear import packed_copy_bytes
from rowcast.placement.plan import Plan
from rowcast.placement.resident import resident_plan
from rowcast.placement.units import format_bytes, parse_bytes
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.detokenizer import Detokenizer
from rowcast.runtime.engine import Engine, MakeDetokenizer
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.outputs import RequestOutput
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.prompts import Prompt, each_prompt
from rowcast.runtime.request import Request
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec, parameter_count
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
        model: str | Path = DEFAULT_MODEL,
        *,
        tensor_parallel_size: int = 1,
        ladder: str = "auto",
        mode: str = "exact",
        dtype: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        host_memory: str | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        seed: int = 0,
        plan: Plan | str | Path | None = None,
        progress: bool | None = None,
    ) -> None:
        """Load a model.

        `model`: a directory with safetensors, a GGUF file, or a hub id. `gpu_memory` and `host_memory` are budgets ("24GiB" or bytes)
        for weights, KV and work space, which a GPU's allocator enforces; libraries and the interpreter come on top. A model that
        runs on the GPU needs host memory for one tensor at a time. `max_model_len`: longest sequence in
        tokens, prompt and output together (the model's own). `max_num_seqs`: sequences that run at the same time (64).
        `max_num_batched_tokens`: tokens in one step (2048); longer prompts are prefilled in chunks. `block_size`: tokens in a KV
        block (16). `seed` derives the seeds of requests that name none. `plan`: a plan or a plan file; it decides all of these but
        the seed, so none of them may be given with it. `progress`: show a bar on standard error while loading; None: if that is a
        terminal.

        Raises UserError (a ValueError) in one sentence for anything that cannot be, OutOfMemoryError where memory is short.
        """
        started = time.perf_counter()
        limits = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "block_size": block_size,
        }
        model = str(model) if isinstance(model, Path) else model
        _check_types({"model": model, "ladder": ladder, "mode": mode, "dtype": dtype, "device": device}, {**limits, "seed": seed})
        _check_choices(tensor_parallel_size, ladder, mode)
        if "ROWCAST_LOG" in os.environ:
            configure_logging()
        threads = settings().threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.spec: ModelSpec = spec_from_config(self.checkpoint.config)
        fingerprint = self.checkpoint.source.fingerprint()
        if plan is None:
            self.plan = self._resident_plan(fingerprint, device, dtype, gpu_memory, host_memory, limits)
        else:
            given: dict[str, object] = {**limits, "gpu_memory": gpu_memory, "host_memory": host_memory}
            given |= {"dtype": None if dtype == "auto" else dtype, "device": None if device == "auto" else device}
            self.plan = self._given_plan(plan, fingerprint, given)
        for note in self.plan.notes:
            log.info("%s", note)
        log.info("plan: %s", self.plan.summary())
        self._tokenizer: Tokenizer | str
        """Or why there is none."""
        try:
            self._tokenizer = load_tokenizer(self.checkpoint)
        except UserError as error:  # Token ids do without; whoever needs text gets the error.
            self._tokenizer = str(error)
        self._build(seed, progress)
        self.load_stats = {"seconds": time.perf_counter() - started, "weight_bytes": self.plan.weight_bytes}

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
        params = _each_params(sampling_params, len(each))
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
        [params] = _each_params(sampling_params, 1)
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

    def _resident_plan(
        self,
        fingerprint: str,
        device: str,
        dtype: str,
        gpu_memory: str | int | None,
        host_memory: str | int | None,
        limits: Mapping[str, int | None],
    ) -> Plan:
        chosen, device_reason = devices.choose_device(device)
        name, dtype_reason = devices.choose_dtype(dtype, self.checkpoint.stored_dtype, chosen)
        asked = {
            what: None if amount is None else parse_bytes(amount, what)
            for what, amount in (("gpu_memory", gpu_memory), ("host_memory", host_memory))
        }
        if chosen.type == "cpu" and gpu_memory is not None:
            raise UserError(
                f"gpu_memory={gpu_memory} was given, but the model runs on the CPU: give host_memory, or device='cuda'"
            )
        budget, budget_reason = devices.budget_bytes(chosen, asked["gpu_memory" if chosen.type == "cuda" else "host_memory"])
        head = self.spec.vocab_size * self.spec.embed_size if self.spec.tied_embeddings else 0
        return resident_plan(
            self.spec,
            fingerprint=fingerprint,
            dtype=name,
            device=str(chosen),
            budget_bytes=budget,
            head_copy_bytes=packed_copy_bytes(chosen, devices.DTYPES[name], head),
            notes=(device_reason, dtype_reason, budget_reason),
            **{key: value for key, value in limits.items() if value is not None},
        )

    def _given_plan(self, plan: Plan | str | Path, fingerprint: str, given: Mapping[str, object]) -> Plan:
        """The caller's plan, if it fits the model and nothing contradicts it."""
        for name, value in given.items():
            if value is not None:
                raise UserError(
                    f"{name}={value} was given together with a plan, which decides that itself: leave one of them out"
                )
        if not isinstance(plan, (Plan, str, Path)):
            raise UserError(f"plan={plan!r:.60} has to be a Plan or the path of a plan file")
        chosen = plan if isinstance(plan, Plan) else Plan.load(plan)
        if chosen.fingerprint != fingerprint:
            raise UserError("the plan was made for other weights than this model's: make a plan for this model")
        if chosen.max_context > self.spec.max_context:
            context = f"the plan's context of {chosen.max_context} tokens is more than the model's {self.spec.max_context}"
            raise UserError(f"{context}: make the plan again")
        _check_choices(chosen.world, " / ".join(chosen.ladder), chosen.mode)
        return chosen

    def _build(self, seed: int, progress: bool | None) -> None:
        """Put the plan into effect: weights, KV store, sampler, engine."""
        plan, spec = self.plan, self.spec
        device, _ = devices.choose_device(plan.device)
        dtype = devices.DTYPES[plan.dtype]
        devices.hold_to_budget(device, plan.budget_bytes)
        try:
            with LoadProgress(self.checkpoint.path.name, parameter_count(spec) * dtype.itemsize, progress) as bar:
                decoder = load_decoder(spec, self.checkpoint.source, dtype=dtype, device=device, progress=bar.advance)
            kv = PagedKV(spec, Shard(), num_blocks=plan.num_blocks, block_size=plan.block_size, dtype=dtype, device=device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise OutOfMemoryError(
                f"{plan.device} ran out of memory while loading: the plan needs {format_bytes(plan.weight_bytes + plan.kv_bytes)} for "
                "weights and KV: free memory on it, lower --max-model-len or use a smaller model"
            ) from error
        self.engine = Engine(
            plan,
            spec,
            LocalExecutor(decoder, kv, Sampler(spec.vocab_size, device)),
            eos_ids=self._eos_ids(),
            seed=seed,
            make_detokenizer=_detokenizers(self._tokenizer),
            token_text=None if isinstance(self._tokenizer, str) else self._tokenizer.token,
        )

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

    def _add(self, prompt: str | list[int], params: SamplingParams) -> Request:
        text, ids = (prompt, self.tokenizer.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
        bad_words = [ids for word in params.bad_words or () for ids in self._bad_word_ids(word)]
        return self.engine.add(ids, params, prompt=text, bad_word_ids=bad_words)

    def _bad_word_ids(self, word: str) -> list[list[int]]:
        """A bad word is forbidden at the start of a text and after a space."""
        found: list[list[int]] = []
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids not in found:
                found.append(ids)
        return found


def _each_params(params: object, count: int) -> list[SamplingParams]:
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
            raise UserError(tokenizer)
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


def _check_choices(tensor_parallel_size: int, ladder: str, mode: str) -> None:
    if tensor_parallel_size != 1:
        raise UserError(f"tensor_parallel_size={tensor_parallel_size} is not to be had: this version runs on one device, use 1")
    if ladder not in ("auto", "plain"):
        raise UserError(f"ladder={ladder!r} is not to be had: this version has the rung plain, use plain or auto")
    if mode not in ("exact", "approximate"):
        raise UserError(f"mode={mode!r} is not known: use exact")
    if mode == "approximate":
        raise UserError("mode='approximate' needs a sparse last rung, and this version has the rung plain only: use exact")
