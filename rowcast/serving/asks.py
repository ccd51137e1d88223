"""From requests to what the backend is asked. Torch-free; texts are tokenised beside the event loop where that takes long."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rowcast.errors import UserError
from rowcast.runtime.params import SamplingParams
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.serving.backend import Ask, Backend, ModelCard, unavailable
from rowcast.serving.errors import ApiError
from rowcast.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, conversation
from rowcast.serving.security import AppSettings

T = TypeVar("T")

_SHORT_CHARS = 4096
"""Texts up to this length are tokenised at once: the way to a thread and back would take longer."""
_LONG_CHARS = 1 << 17
"""Longer ones wait for each other, and nobody else for them."""
_THREADS = 2

MOST_LOGPROBS = 512
"""Log-probabilities that one request is told of a step: of each answer that of the token, and those of the likeliest ones."""


class Asker:
    """Checks requests against the model and the server's limits. Raises ApiError and UserError for what cannot be."""

    def __init__(self, backend: Backend, settings: AppSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._threads = ThreadPoolExecutor(_THREADS, "rowcast-tokenise")
        self._long = ThreadPoolExecutor(1, "rowcast-tokenise-long")

    def close(self) -> None:
        for threads in (self._threads, self._long):
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def card(self) -> ModelCard:
        """Raises ServingError before there is one."""
        state, reason = self._backend.state()
        if state == "starting":
            raise unavailable(f"the model is not loaded yet: {reason or 'try again later'}", retry_after_s=5.0)
        return self._backend.card

    @property
    def names(self) -> tuple[str, ...]:
        """By which requests may call the model."""
        return self._settings.model_names or (self.card.name,)

    @property
    def max_body_bytes(self) -> int:
        if self._settings.max_body_bytes is not None:
            return self._settings.max_body_bytes
        loaded = self._backend.state()[0] != "starting"
        return max(1 << 20, 32 * self._backend.card.max_context) if loaded else 1 << 20

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served; None is the one that is."""
        if name is not None and name not in self.names:
            served = " and ".join(self.names)
            raise ApiError(404, f"the model {name[:80]!r} is not served here, {served} is", param="model", code="model_not_found")

    def has_tokenizer(self) -> bool:
        try:
            _ = self._backend.tokenizer
        except UserError:
            return False
        return True

    async def completion(self, request: CompletionRequest, completion_id: str, client: str) -> list[Ask]:
        """One for each prompt."""
        self.check_model(request.model)
        n = request.n or 1
        self._check_choices(len(request.prompt), n)
        if request.best_of not in (None, n):
            raise ApiError(
                400, f"best_of is {request.best_of}, but only n, {n}, is supported", param="best_of", code="unsupported"
            )
        if request.echo and request.logprobs is not None:
            raise ApiError(
                400, "echo is not supported together with logprobs: leave out either", param="echo", code="unsupported"
            )
        _check_logprobs(len(request.prompt) * n, request.logprobs, "logprobs")
        params = request.params(detokenize=self.has_tokenizer())
        prompts = await self._prompts(request.prompt)
        if request.echo:
            _ = self._backend.tokenizer
        several = len(prompts) > 1
        return [
            self._ask(f"{completion_id}-{at}" if several else completion_id, ids, params, request, client, "prompt")
            for at, ids in enumerate(prompts)
        ]

    async def chat(self, request: ChatRequest, completion_id: str, client: str) -> Ask:
        self.check_model(request.model)
        self._check_choices(1, request.n or 1)
        _check_logprobs(request.n or 1, request.top_logprobs, "top_logprobs")
        params = request.params(detokenize=True)
        ids = await self._conversation(conversation(request.messages))
        return self._ask(completion_id, ids, params, request, client, "messages")

    async def tokenize(self, request: TokenizeRequest) -> tuple[list[int], list[str] | None]:
        """Ids and, where they are asked for, the text of each."""
        self.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "prompt or messages has to be given, one of them", param="prompt", code="missing_field")
        if request.messages is not None:
            turns = conversation(request.messages)
            ids = await self._conversation(turns, add_generation_prompt=request.add_generation_prompt is not False)
        else:
            text, special = request.prompt or "", request.add_special_tokens is not False
            ids = await self._encode(lambda tokenizer: tokenizer.encode(text, add_special_tokens=special), len(text))
        if not request.return_token_strs:
            return ids, None
        return ids, await self._encode(lambda tokenizer: [tokenizer.token(token) for token in ids], len(ids))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        self.check_model(request.model)
        vocabulary = self.card.vocab_size
        wrong = next((token for token in request.tokens if token >= vocabulary), None)
        if wrong is not None:
            sentence = f"token id {wrong} is outside the vocabulary, 0 to {vocabulary - 1}"
            raise ApiError(400, sentence, param="tokens", code="invalid_value")
        skip = bool(request.skip_special_tokens)
        return await self._encode(
            lambda tokenizer: tokenizer.decode(request.tokens, skip_special_tokens=skip), len(request.tokens)
        )

    def _check_choices(self, prompts: int, n: int) -> None:
        most = self._settings.max_choices
        if prompts * n > most:
            raise ApiError(
                400, f"the request asks for {prompts * n} answers, {prompts} prompts times n={n}: at most {most} are given at a time",
                param="n" if n > 1 else "prompt", code="too_many_choices",
            )  # fmt: skip

    def _ask(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        request: CompletionRequest | ChatRequest,
        client: str,
        param: str,
    ) -> Ask:
        context = self.card.max_context
        if len(ids) >= context and params.truncate_prompt_tokens is None:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, but the context is {context} and one token has to be generated: shorten it to "
                f"{context - 1} tokens, or set truncate_prompt_tokens", param=param, code="context_length_exceeded",
            )  # fmt: skip
        return Ask(request_id, ids, params, client, request.deadline_s, request.ladder, request.mode)

    async def _prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Their ids."""
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        if not size:
            return [list(prompt) for prompt in prompts if not isinstance(prompt, str)]
        return await self._encode(
            lambda tokenizer: [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts],
            size,
            otherwise=", or pass prompts as token ids",
        )

    async def _conversation(self, turns: Sequence[dict[str, str]], **options: bool) -> list[int]:
        # In a thread whatever its length: the first template that is applied imports Transformers.
        size = sum(len(turn["content"]) for turn in turns)
        return await self._encode(lambda tokenizer: tokenizer.chat(turns, **options), max(size, _SHORT_CHARS + 1))

    async def _encode(self, work: Callable[[Tokenizer], T], size: int, *, otherwise: str = "") -> T:
        """Raises UserError where the model has no tokenizer; `otherwise`: what to do then."""
        _ = self.card
        try:
            tokenizer = self._backend.tokenizer
        except UserError as error:
            raise UserError(str(error).removesuffix(".") + otherwise) from None
        if size <= _SHORT_CHARS:
            return work(tokenizer)
        threads = self._threads if size <= _LONG_CHARS else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work, tokenizer)


def _check_logprobs(answers: int, likeliest: int | None, param: str) -> None:
    """Raises ApiError where a step has too many: they are held, and written, for all answers at the same time."""
    wanted = answers * (1 + (likeliest or 0))
    if likeliest is not None and wanted > MOST_LOGPROBS:
        raise ApiError(
            400,
            f"{param}={likeliest} for {answers} answers asks for {wanted} log-probabilities at a time, and at most {MOST_LOGPROBS} are "
            f"given: set {param} to {MOST_LOGPROBS // answers - 1} or less, or ask for fewer answers",
            param=param,
            code="too_many_logprobs",
        )


def new_id(prefix: str) -> str:
    """Of a completion: nobody can guess another's."""
    return f"{prefix}-{secrets.token_hex(12)}"
