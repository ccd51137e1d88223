"""The OpenAPI document: what answers look like, and errors. Torch-free.

These models describe; `answers` writes. The tests hold one to the other.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from rowcast import __version__
from rowcast.serving.security import OPEN_PATHS

FinishReason = Literal["stop", "length"]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "temperature is 3: input should be less than or equal to 2",
                        "type": "invalid_request_error",
                        "param": "temperature",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    error: ErrorBody


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="Tokens, prompt and output.")
    vocab_size: int
    ladder: str
    mode: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class UsageBlock(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")


class _Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageBlock
    rowcast: dict[str, Any] | list[dict[str, Any]] = Field(
        description="What the engine says of the request: acceptance, density, tokens_per_round, bytes_read, seed and more; "
        "with several prompts one for each."
    )


class ChatCompletion(_Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = Field(default=None, description="Where `return_token_ids` asks for them.")


class Completion(_Completion):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["alive"]
    state: str


class Ready(BaseModel):
    state: Literal["ready"]


class NotReady(ErrorResponse):
    state: str
    reason: str


class Version(BaseModel):
    version: str


_TOLD = {
    400: "The request cannot be honoured.",
    401: "An API key is needed.",
    403: "Called under a name, or from a page, that is not allowed.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests wait; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server takes no requests now.",
    504: "The request's deadline passed.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that may fail in these ways."""
    return {status: {"model": ErrorResponse, "description": _TOLD[status]} for status in statuses}


def event_stream(example: str) -> dict[int | str, dict[str, Any]]:
    """A 200 that is a stream where the request asks for one."""
    return {200: {"content": {"text/event-stream": {"schema": {"type": "string"}, "example": example}}}}


def text(kind: str) -> dict[int | str, dict[str, Any]]:
    """A 200 of that media type."""
    return {200: {"content": {kind: {"schema": {"type": "string"}}}}}


def describe(app: FastAPI, *, keys: bool) -> None:
    """Let `app.openapi` give the document, completed. `keys`: whether an API key is needed."""
    made = app.openapi
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_completed(made(), keys=keys))
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: dict[str, Any], *, keys: bool) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here such errors are 400.
            if keys and path in OPEN_PATHS:
                operation["security"] = []
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    document["info"]["version"] = __version__
    return document
