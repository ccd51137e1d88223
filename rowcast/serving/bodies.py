"""Large bodies, read beside the event loop: JSON in pieces, as one call that reads megabytes lets no other thread run. Torch-free."""

from __future__ import annotations

import asyncio
import json
import json.decoder
import json.scanner
import re
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from rowcast.serving.errors import ApiError
from rowcast.serving.stream import unless_gone

LARGE_BYTES = 1 << 15
"""Smaller bodies are read at once: the way to a thread and back would take longer."""
MOST_PARTS = 100_000
"""Lists and objects of a large body. Thirty times what the largest conversation has."""

_PIECE = 1 << 15
"""Characters that one call reads."""
_NUMBERS = re.compile(r"[0-9, \t\n\r]*")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _Decoder(json.JSONDecoder):
    """`json.loads` of one text. The module's own scanner in Python, so that threads take turns, but for lists of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._parts = 0
        read_object, read_list = json.decoder.JSONObject, json.decoder.JSONArray  # type: ignore[attr-defined]

        def counted(*arguments: Any) -> Any:
            self._count()
            return read_object(*arguments)

        def in_pieces(at: tuple[str, int], scan: Any) -> tuple[list[Any], int]:
            self._count()
            text, place = at
            found: list[Any] = []
            while (stop := text.rfind(",", place, place + _PIECE)) > place and _NUMBERS.fullmatch(text, place, stop):
                try:
                    some = json.loads(f"[{text[place:stop]}]")
                except ValueError:
                    break  # which is told below, with its place
                if not some:
                    break
                found += some
                place = stop + 1
            rest, end = read_list((text, place), scan)
            if found and not rest:
                raise json.JSONDecodeError("Expecting value", text, place)
            return found + rest if found else rest, end

        self.parse_object, self.parse_array = counted, in_pieces
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _count(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise ApiError(400, f"the body has more than {MOST_PARTS} lists and objects: send less", code="invalid_value")


def read_body(model: type[BaseModel], body: bytes) -> BaseModel:
    """What FastAPI makes of a body. Raises what it raises for one that is wrong, and ApiError for one of too many parts."""
    try:
        value = _Decoder().decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except json.JSONDecodeError as error:
        wrong = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "ctx": {"error": error.msg}}
        raise RequestValidationError([wrong]) from None
    except (ValueError, RecursionError):
        raise HTTPException(400) from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        wrongs = [{**each, "loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
        raise RequestValidationError(wrongs) from None


class Reader:
    """One thread for all large bodies: they wait for each other, and nobody else for them."""

    def __init__(self, models: Mapping[str, type[BaseModel]]) -> None:
        """`models`: of the routes' bodies, by path."""
        self._models = models
        self._thread = ThreadPoolExecutor(1, "rowcast-read")

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def route_class(self) -> type[APIRoute]:
        """Of a router whose routes' large bodies it reads."""
        reader = self

        class Route(APIRoute):
            def get_route_handler(self) -> Handler:
                handler: Handler = super().get_route_handler()
                model = reader._models.get(self.path)
                return handler if model is None else reader._beside(handler, model)

        return Route

    def _beside(self, handler: Handler, model: type[BaseModel]) -> Handler:
        async def handle(request: Request) -> Response:
            body = await request.body()
            if len(body) < LARGE_BYTES:
                return await handler(request)
            reading = asyncio.get_running_loop().run_in_executor(self._thread, read_body, model, body)
            return await handler(_Read(request, body, await unless_gone(request.receive, reading)))

        return handle


class _Read(Request):
    """A request whose body was read: FastAPI takes a model of the right kind as it is."""

    def __init__(self, request: Request, body: bytes, read: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._body, self._json = body, read
