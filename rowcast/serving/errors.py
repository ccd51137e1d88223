"""Errors as OpenAI's clients read them: an exception in; a status, headers and a JSON body out. Torch-free."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.runtime.params import SamplingParams
from rowcast.serving.backend import ServingError

_NAMED = frozenset(f.name for f in fields(SamplingParams)) | {"mode"}
_TOLD = (
    (re.compile(r"the ladder |'.*' in the ladder "), "ladder"),
    (re.compile(r"(the )?prompt |.* tokenizer\b"), "prompt"),
    (re.compile(r"the chat template |this model has no chat template|the conversation |message \d"), "messages"),
)
"""What sentences begin with that are of a field and do not begin with its name."""

INVALID = "invalid_request_error"


class FieldError(ValueError):
    """What is wrong with a field of a body, for pydantic's validators to raise."""

    def __init__(self, sentence: str, *, field: str | None = None, code: str = "invalid_value") -> None:
        """`field`: one below the value that is being read, from whose path the sentence goes on; None: what that value should be."""
        super().__init__(sentence)
        self.field, self.code = field, code


class ApiError(Exception):
    """What a client is told instead of an answer, in one sentence."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`status`: HTTP's. `kind`, `param` and `code`: `type`, `param` and `code` of OpenAI's error object."""
        super().__init__(sentence)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def as_api_error(error: Exception, request_id: str = "", prompt: str = "prompt") -> ApiError:
    """What to tell a client of any exception. One that is nobody's mistake but ours says nothing but where the log has it. `prompt`:
    the field that has the prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ServingError):
        after = {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        return ApiError(error.status, str(error), kind=error.kind, code=error.code, headers=after)
    if isinstance(error, OutOfMemoryError):
        return ApiError(400, str(error), param="max_tokens", code="out_of_memory")
    if isinstance(error, UserError):
        param = _param(str(error))
        return ApiError(400, str(error), param=prompt if param == "prompt" else param, code="invalid_value")
    return ApiError(
        500,
        f"the server failed at this request: its log says more under the id {request_id}",
        kind="server_error",
        code="internal",
    )


def invalid_body(errors: Sequence[Any]) -> ApiError:
    """What to tell of a body that is not as the schema says; the first of pydantic's `errors` is told."""
    error = errors[0]
    context, found = error.get("ctx") or {}, error.get("type")
    param = path_of(error["loc"])
    if found == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', 'it cannot be read')}", code="invalid_json")
    if isinstance(cause := context.get("error"), FieldError) and cause.field is not None:
        where = f"{param}.{cause.field}" if param else cause.field
        return ApiError(400, f"{where} {cause}", param=where, code=cause.code)
    if found == "missing":
        return ApiError(400, f"{param or 'the body'} is missing", param=param, code="missing_field")
    wish = str(cause) if cause else error["msg"][:1].lower() + error["msg"][1:]
    shown = "" if "input" not in error else f" is {_short(error['input'])}"
    return ApiError(400, f"{param or 'the body'}{shown}: {wish}", param=param, code="invalid_value")


def path_of(location: Sequence[int | str]) -> str | None:
    """pydantic's location as clients write it, messages[0].content; None for the body itself."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]" if path else ""
        elif part.isidentifier() and part != "body":
            path += f".{part}" if path else part
    return path or None


def json_text(value: object) -> str:
    """JSON on one line, in ASCII, as every client reads it; numbers that JSON does not have become null.

    Some clients split events at any of Unicode's line breaks, so none may stand in the text.
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _param(sentence: str) -> str | None:
    """The field that a UserError's sentence is about."""
    found = re.match(r"[a-z_]+", sentence)
    if found and found[0] in _NAMED:
        return found[0]
    return next((field for begins, field in _TOLD if begins.match(sentence)), None)


def _short(value: object) -> str:
    """On one line, not longer than a line, without what cannot be sent."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()[:80]
