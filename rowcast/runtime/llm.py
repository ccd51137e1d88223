"""The driver API: a model, its tokenizer and an engine in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

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
from rowcast.runtime.engine import Engine
from rowcast.runtime.executor import LocalExecutor
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.model import load_decoder
from rowcast.runtime.outputs import RequestOutput, StreamChunk
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.progress import LoadProgress
from rowcast.runtime.request import Request, Sequence
from rowcast.runtime.sampler import Sampler
from rowcast.runtime.shard import Shard
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.tokenizer import Tokenizer, load_tokenizer
from rowcast.settings import settings

log = logging.getLogger("rowcast")

Prompt = str | Seq[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}."""

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""


class LLM:
    """A language model ready to generate.

    >>> llm = LLM("SmolLM2-135M-Instruct")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        tensor_parallel_size: int = 1,
        ladder: str = "auto",
        mode: str = "exact",
        dtype: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        host_memory: str | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        seed: int = 0,
        plan: Plan | str | Path | None = None,
        progress: bool | None = None,
    ) -> None:
        """Load a model.

        `model`: a directory with safetensors, a GGUF file, or a hub id. `gpu_memory` and `host_memory` are hard budgets ("24GiB" or
        bytes) for the device that the model runs on. `max_model_len`: longest sequence in tokens, prompt and output together.
        `max_num_batched_tokens`: tokens in one step; longer prompts are prefilled in chunks. `seed` derives the seeds of requests that
        name none. `plan`: a plan or a plan file, which then decides everything but the model. `progress`: show a bar on standard
        error while loading; None: if that is a terminal.

        Raises UserError (a ValueError) in one sentence for anything that cannot be, OutOfMemoryError where memory is short.
        """
        started = time.perf_counter()
        _check_choices(tensor_parallel_size, ladder, mode)
        threads = settings().threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.spec: ModelSpec = spec_from_config(self.checkpoint.config)
        fingerprint = self.checkpoint.source.fingerprint()
        if plan is None:
            self.plan = self._resident_plan(
                fingerprint,
                dtype,
                device,
                gpu_memory,
                host_memory,
                max_model_len,
                max_num_seqs,
                max_num_batched_tokens,
                block_size,
            )
        else:
            self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
            if self.plan.fingerprint != fingerprint:
                raise UserError(f"the plan was made for other weights than those of {model}: make a plan for this model")
            _check_choices(
                self.plan.world, self.plan.ladder[-1] if len(self.plan.ladder) == 1 else str(self.plan.ladder), self.plan.mode
            )
        for note in self.plan.notes:
            log.info("%s", note)
        log.info("plan: %s", self.plan.summary())
        self._build(seed, progress)
        self._tokenizer: Tokenizer | None = None
        self.load_stats = {"seconds": time.perf_counter() - started, "weight_bytes": self.plan.weight_bytes}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded when first asked for. Raises UserError if the model has none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint)
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Seq[Prompt], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete prompts: text, token ids, or lists of them; one SamplingParams for all or one each. Results in input order."""
        each = _prompts(prompts)
        params = _params(sampling_params, len(each))
        requests: list[Request] = []
        try:
            for prompt, param in zip(each, params, strict=True):
                requests.append(self._add(prompt, param))
            while any(not r.finished for r in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request)
        return [request.output() for request in requests]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Complete one prompt and yield text as soon as it is final. The last chunk carries the whole `output`.

        Bad input raises here, not at the first chunk. Dropping the iterator cancels the request.
        """
        return self._stream(self._add(prompt, sampling_params or SamplingParams()))

    def chat(
        self, messages: Seq[Message] | Seq[Seq[Message]], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's own chat template."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        return self.generate([self.tokenizer.chat(conversation) for conversation in conversations], sampling_params)  # type: ignore[arg-type]

    def stream_chat(self, messages: Seq[Message], sampling_params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """`chat` for one conversation, streamed."""
        return self.stream(self.tokenizer.chat(messages), sampling_params)

    def _resident_plan(
        self,
        fingerprint: str,
        dtype: str,
        device: str,
        gpu_memory: str | int | None,
        host_memory: str | int | None,
        max_model_len: int | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_size: int,
    ) -> Plan:
        chosen, device_reason = devices.choose_device(device)
        name, dtype_reason = devices.choose_dtype(dtype, self.checkpoint.stored_dtype, chosen)
        budgets = {
            what: None if asked is None else parse_bytes(asked, what)
            for what, asked in (("gpu_memory", gpu_memory), ("host_memory", host_memory))
        }
        budget, budget_reason = devices.budget_bytes(chosen, budgets["gpu_memory" if chosen.type == "cuda" else "host_memory"])
        head = self.spec.vocab_size * self.spec.embed_size if self.spec.tied_embeddings else 0
        return resident_plan(
            self.spec,
            fingerprint=fingerprint,
            dtype=name,
            device=str(chosen),
            budget_bytes=budget,
            head_copy_bytes=packed_copy_bytes(chosen, devices.DTYPES[name], head),
            max_context=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_num_batched_tokens,
            block_size=block_size,
            notes=(device_reason, dtype_reason, budget_reason),
        )

    def _build(self, seed: int, progress: bool | None) -> None:
        """Put the plan into effect: weights, KV store, sampler, engine."""
        plan, spec = self.plan, self.spec
        device, _ = devices.choose_device(plan.device)
        dtype = devices.DTYPES[plan.dtype]
        devices.hold_to_budget(device, plan.budget_bytes)
        try:
            with LoadProgress(self.checkpoint.path.name, plan.weight_bytes, progress) as bar:
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
            make_detokenizer=self._make_detokenizer,
            token_text=lambda token: self.tokenizer.token(token),
        )

    def _eos_ids(self) -> list[int]:
        ids = self.checkpoint.generation_config.get("eos_token_id", self.checkpoint.config.get("eos_token_id"))
        if ids is None:
            return []
        return [int(i) for i in ids] if isinstance(ids, list) else [int(ids)]

    def _make_detokenizer(self, params: SamplingParams, prompt_ids: Seq[int]) -> Detokenizer:
        return Detokenizer(
            self.tokenizer,
            stop=list(params.stop_strings),
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt_ids=prompt_ids,
        )

    def _add(self, prompt: Prompt, params: SamplingParams) -> Request:
        text, ids = self._tokenize(prompt)
        bad_words = [ids for word in params.bad_words or () for ids in self._bad_word_ids(word)]
        return self.engine.add(ids, params, prompt=text, bad_word_ids=bad_words)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            given = [prompt[key] for key in ("prompt_token_ids", "prompt") if key in prompt]
            if len(given) != 1 or len(prompt) != 1:
                raise UserError(
                    f"a prompt mapping has the key prompt or prompt_token_ids, not {', '.join(map(str, prompt)) or 'none'}"
                )
            prompt = given[0]
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("the prompt is empty: give at least one character")
            return prompt, self.tokenizer.encode(prompt)
        ids = [i for i in prompt if isinstance(i, int) and not isinstance(i, bool)]
        if len(ids) != len(prompt):
            raise UserError(f"a prompt is text or a list of token ids, not {prompt!r:.60}")
        return None, ids

    def _bad_word_ids(self, word: str) -> list[list[int]]:
        """A bad word is forbidden at the start of a text and after a space."""
        found: list[list[int]] = []
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if ids not in found:
                found.append(ids)
        return found

    def _stream(self, request: Request) -> Iterator[StreamChunk]:
        try:
            while True:
                gained = [seq for seq in self.engine.step() if seq.request is request]
                chunks = [chunk for seq in gained if (chunk := _chunk(seq)) is not None]
                if request.finished:
                    last = chunks.pop()
                    yield from chunks
                    yield StreamChunk(last.text, last.token_ids, last.index, last.finish_reason, request.output())
                    return
                yield from chunks
        finally:
            self.engine.abort(request)


def _chunk(seq: Sequence) -> StreamChunk | None:
    """What the sequence gained and may be shown, None if all of it is held back."""
    text = "" if seq.detokenizer is None else seq.detokenizer.take_delta()
    held_back = seq.detokenizer is not None and not text and seq.finish_reason is None
    if held_back:
        return None
    ids = seq.output_ids[seq.streamed_tokens :]
    seq.streamed_tokens = len(seq.output_ids)
    return StreamChunk(text, ids, seq.sample_index, seq.finish_reason)


def _prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or several -> a list of prompts."""
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params(params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UserError(f"{len(params)} SamplingParams were given for {count} prompts: give one, or one for each prompt")
    return list(params)


def _check_choices(tensor_parallel_size: int, ladder: str, mode: str) -> None:
    if tensor_parallel_size != 1:
        raise UserError(f"tensor_parallel_size={tensor_parallel_size} is not to be had: this version runs on one device, use 1")
    if ladder not in ("auto", "plain"):
        raise UserError(f"ladder={ladder!r} is not to be had: this version has the rung plain, use plain or auto")
    if mode not in ("exact", "approximate"):
        raise UserError(f"mode={mode!r} is not known: use exact")
    if mode == "approximate":
        raise UserError("mode='approximate' needs a sparse last rung, and this version has the rung plain only: use exact")
