"""What clients send, in OpenAI's terms and vLLM's beyond those. Torch-free.

Every field that is accepted is honoured, or listed as one that changes no answer. A field that is unknown, and one of OpenAI's that is
not supported, is refused by name. Defaults are OpenAI's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from rowcast.runtime.params import SamplingParams
from rowcast.serving.errors import FieldError

MOST_STOPS, MOST_STOP_CHARS = 16, 256
MOST_BIASES = 1024
MOST_STOP_IDS = 256
MOST_TOP_LOGPROBS = 20
_MOST = 2**31 - 1
_AT_ONCE = 1 << 16

_NOT_SUPPORTED = {
    **dict.fromkeys(("tools", "tool_calls", "tool_choice", "parallel_tool_calls"), "tools"),
    **dict.fromkeys(("functions", "function_call"), "functions"),
    "audio": "audio",
    "modalities": "anything but text",
    "prediction": "predicted outputs",
    "reasoning_effort": "reasoning effort",
    "response_format": "formats other than text",
    "suffix": "filling in before a suffix",
    "verbosity": "verbosity",
    "web_search_options": "searching the web",
}


class _FirstError(FailFast):
    """Lists end at their first wrong element. As pydantic's own, which a union with None cannot hold."""

    __hash__ = object.__hash__


class _Strict(BaseModel):
    """Refuses unknown fields and values of another type than JSON's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, given: object) -> object:
        """One sentence for the first field that is unknown or not supported, however many there are."""
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name)[:64], cls.model_fields, n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out"
                raise FieldError(f"is not a field of this request: {hint}", field=str(name)[:64], code="unknown_field")
            if name in _NOT_SUPPORTED and value not in (None, []) and not _harmless(name, value):
                missing = _NOT_SUPPORTED[name]
                raise FieldError(
                    f"is set, but this server does not support {missing}: leave it out", field=name, code="unsupported"
                )
        return given


def _harmless(name: str, value: object) -> bool:
    """Whether that value of a field asks for nothing that is missing."""
    return (name, value) in (
        ("tool_choice", "none"), ("function_call", "none"), ("modalities", ["text"]), ("response_format", {"type": "text"})
    )  # fmt: skip


def _are_ids(values: list[object]) -> bool:
    """Whether they are token ids, as fast as Python tells: there may be a million. In pieces, between which other threads run."""
    for first in range(0, len(values), _AT_ONCE):
        some = values[first : first + _AT_ONCE]
        if set(map(type, some)) != {int} or min(some) < 0 or max(some) > _MOST:  # type: ignore[type-var, operator]
            return False
    return bool(values)


def _prompts(given: object) -> list[str | list[int]]:
    """OpenAI's four forms, as a list of texts and lists of ids. By hand: pydantic would note an error for each wrong element."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and _are_ids(given):
        return [given]
    if not isinstance(given, list) or not given:
        raise FieldError("should be a text, a list of token ids, or a list of those")
    for at, prompt in enumerate(given):
        if isinstance(prompt, str):
            _check_text(prompt)
        elif not (isinstance(prompt, list) and (not prompt or _are_ids(prompt))):
            raise FieldError(f"should be a text, a list of token ids, or a list of those; element {at} is neither")
        if not prompt:
            raise FieldError(
                "should hold at least one token" if len(given) == 1 else f"should hold no empty prompts, element {at} is one"
            )
    return given


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(f"should be valid Unicode, character {error.start} is half of a surrogate pair") from None
    return text


def _content(given: object) -> object:
    """Text, or OpenAI's list of parts, joined by line breaks as vLLM does."""
    if not isinstance(given, list):
        return given
    texts = []
    for at, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = str(part.get("type"))[:32] if isinstance(part, dict) else type(part).__name__
            raise FieldError(f"should hold text only, part {at} is of type {kind}, which this server does not support")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise FieldError(f"should hold parts with a type and a text only, part {at} is another")
        texts.append(_check_text(part["text"]))
    return "\n".join(texts)


def _role(given: object) -> object:
    if given in ("tool", "function"):
        raise FieldError("should be system, developer, user or assistant: this server does not support tools")
    return given


def _stops(given: object) -> object:
    return [given] if isinstance(given, str) else given


def _few(given: object) -> object:
    """Counted before each entry is looked at."""
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise FieldError(f"should have at most {MOST_BIASES} entries")
    return given


_TEXT_OR_IDS: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _MOST}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": _MOST}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
_PARTS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
        },
    ]
}
_STOP_TEXT: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARS}

Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_TEXT_OR_IDS)]
Content = Annotated[str, BeforeValidator(_content), WithJsonSchema(_PARTS)]
Role = Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_role)]
Stops = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=MOST_STOP_CHARS)]],
    _FirstError(),
    Field(max_length=MOST_STOPS),
    BeforeValidator(_stops),
    WithJsonSchema({"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MOST_STOPS}]}),
]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MOST)]], _FirstError()]
Biases = Annotated[
    dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_few),
    Field(max_length=MOST_BIASES),
]
Nothing = Annotated[None, Field(description="Not supported: null, or left out.")]
Empty = Annotated[Annotated[list[Any], Field(max_length=0)] | None, Field(description="Not supported: null, empty, or left out.")]
Ignored = Field(default=None, description="Accepted; it changes no answer.")


class StreamOptions(_Strict):
    include_usage: bool | None = Field(default=None, description="One more chunk at the end, without choices and with the usage.")


class _Generation(_Strict):
    """What both kinds of requests may ask of sampling."""

    model: str | None = Field(default=None, description="A name that GET /v1/models lists; left out: the served model.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = Field(default=None, description="By token id, added to the logits.")
    n: Annotated[int, Field(ge=1, le=1024)] | None = Field(default=None, description="Answers to each prompt; 1.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(default=None, description="The same seed gives the same answer.")
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="1; 0 takes the likeliest token.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    top_k: Annotated[int, Field(ge=-1, le=_MOST)] | None = Field(default=None, description="Draw from so many likeliest tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MOST_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_MOST)] | None = Field(
        default=None, description="Keep so many last tokens of the prompt; -1: as many as fit."
    )
    ladder: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Rungs of the server's ladder that may draft, as in `ngram / plain`."
    )
    mode: Literal["exact", "approximate"] | None = None
    return_token_ids: bool | None = Field(default=None, description="`token_ids` in each choice; vLLM's.")
    deadline_s: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        default=None, description="The request ends with an error if it is not finished in so many seconds."
    )

    user: str | None = Ignored
    metadata: dict[str, Any] | None = Ignored
    store: bool | None = Ignored
    service_tier: str | None = Ignored
    prompt_cache_key: str | None = Ignored
    safety_identifier: str | None = Ignored

    def _sampling(self, **more: object) -> SamplingParams:
        """Raises UserError for what only SamplingParams knows."""
        names: tuple[str, ...] = (
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "n",
            "seed",
        )
        names += ("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens")
        names += ("truncate_prompt_tokens",)
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        bias = {int(token): value for token, value in self.logit_bias.items()} if self.logit_bias else None
        return SamplingParams(**given, logit_bias=bias, **more)  # type: ignore[arg-type]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}]
        }
    )

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="No other value than n's is supported."
    )
    echo: bool | None = Field(default=None, description="Begin the text with the prompt's; not together with logprobs.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = Field(default=None, description="16.")
    suffix: Nothing = None

    def params(self, *, detokenize: bool) -> SamplingParams:
        return self._sampling(
            max_tokens=16 if self.max_tokens is None else self.max_tokens, logprobs=self.logprobs, detokenize=detokenize
        )


class Message(_Strict):
    """One turn of a conversation. Fields of an answer may stay when it is sent back as an assistant's message."""

    role: Role
    content: Content
    name: Annotated[str, StringConstraints(max_length=64)] | None = Field(default=None, description="Given to the chat template.")
    refusal: Nothing = None
    annotations: Empty = None
    audio: Nothing = None
    tool_calls: Empty = None
    function_call: Nothing = None


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}]}
    )

    messages: Annotated[list[Message], _FirstError(), Field(min_length=1, max_length=10_000)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = Field(default=None, description="Up to the end of the context.")
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MOST)] | None = Field(default=None, description="OpenAI's newer name.")
    response_format: Annotated[dict[Literal["type"], Literal["text"]], Field(min_length=1)] | None = None

    tools: Empty = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Nothing = None
    functions: Empty = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("is set, but logprobs is not: set logprobs to true", field="top_logprobs", code="conflict")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("and max_completion_tokens differ: give one of them", field="max_tokens", code="conflict")
        return self

    def params(self, *, detokenize: bool) -> SamplingParams:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(max_tokens=most, logprobs=logprobs, detokenize=detokenize)


def conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Turns as chat templates know them."""
    found = []
    for message in messages:
        turn = {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        found.append(turn if message.name is None else {**turn, "name": message.name})
    return found


class TokenizeRequest(_Strict):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The capital of France is"}]})

    model: str | None = None
    prompt: Annotated[str, StringConstraints(min_length=1)] | None = None
    messages: Annotated[list[Message], _FirstError(), Field(min_length=1, max_length=10_000)] | None = None
    add_special_tokens: bool | None = Field(default=None, description="For a text: the tokens that begin and end a prompt; true.")
    add_generation_prompt: bool | None = Field(default=None, description="For a conversation: what an answer begins with; true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [504, 3575, 282]}]})

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = Field(default=None, description="False.")
