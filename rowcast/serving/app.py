"""The HTTP application: OpenAI's routes and some of vLLM's, over whatever runs the model.

Routes check, ask the backend and say what came; `security.Guard` is around all of them. Torch-free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from rowcast import __version__
from rowcast.serving import documents as doc
from rowcast.serving.answers import Answer, ChatAnswer, CompletionAnswer, token_bytes
from rowcast.serving.asks import Asker, new_id
from rowcast.serving.backend import Ask, Backend
from rowcast.serving.bodies import Reader
from rowcast.serving.errors import ApiError, as_api_error, invalid_body, json_text
from rowcast.serving.logs import Exchange, RequestLog
from rowcast.serving.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rowcast.serving.security import PAGE_PATH, AppSettings, Guard, OnAnswer
from rowcast.serving.stream import EventStream, Running, answer_events, unless_gone, whole_answer

_PAGE = Path(__file__).parent / "page"
_LIVE_S = 0.25
"""Between two snapshots of /live/stream."""
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ASK_FIRST = {"cache-control": "no-cache"}
_CREATE = doc.errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
_READ = doc.errors(401, 403, 500, 503)


def make_app(backend: Backend, settings: AppSettings | None = None, on_answer: OnAnswer | None = None) -> FastAPI:
    """The application over `backend`, which may still be starting. `on_answer` is told of each answer, for metrics."""
    settings = settings or AppSettings()
    log = RequestLog(enabled=settings.log_requests)
    asker = Asker(backend, settings)
    reader = Reader(_BODIES)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            asker.close()
            reader.close()
            log.close()

    app = FastAPI(
        title="Rowcast",
        description="A language model with OpenAI's API. Errors are OpenAI's error object.",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = reader.route_class()
    app.add_middleware(
        Guard, settings=settings, log=log, max_body_bytes=lambda: asker.max_body_bytes, on_answer=on_answer
    )  # fmt: skip
    if settings.allowed_origins:  # Outside the guard: browsers ask whether they may without a key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    _add_generation(app, backend, asker, log)
    _add_models(app, asker)
    _add_tokens(app, asker)
    _add_watching(app, backend, settings, log)
    _add_page(app)
    doc.describe(app, keys=bool(settings.api_keys))
    return app


def _add_generation(app: FastAPI, backend: Backend, asker: Asker, log: RequestLog) -> None:
    async def respond(
        request: Request, asks: list[Ask], body: ChatRequest | CompletionRequest, make: Callable[..., Answer], **more: Any
    ) -> Response:
        exchange: Exchange = request.scope["exchange"]
        completion_id = exchange.completion_id or ""
        usage = bool(body.stream_options and body.stream_options.include_usage)
        if asks[0].params.logprobs is not None and asks[0].params.detokenize:
            more["token_bytes"] = token_bytes(backend.tokenizer)
            more["hidden"] = backend.tokenizer.special_ids if asks[0].params.skip_special_tokens else frozenset()
        answer = make(
            completion_id,
            int(time.time()),
            body.model or asker.names[0],
            asker.card,
            len(asks),
            asks[0].params.n,
            include_usage=usage,
            token_ids=bool(body.return_token_ids),
            **more,
        )
        running = await unless_gone(request.receive, _begun(backend, asks, exchange))
        if body.stream:
            return EventStream(answer_events(running, answer), close=running.aclose, exchange=exchange, log=log)
        try:
            return _json(await unless_gone(request.receive, whole_answer(running, answer)))
        finally:
            await running.aclose()

    @app.post(
        "/v1/completions",
        response_model=doc.Completion,
        responses={**_CREATE, **doc.event_stream('data: {"id":"cmpl-1","object":"text_completion",...}\n\ndata: [DONE]\n\n')},
        tags=["OpenAI"],
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts: texts or lists of token ids."""
        exchange: Exchange = request.scope["exchange"]
        exchange.completion_id = new_id("cmpl")
        asks = await unless_gone(request.receive, asker.completion(body, exchange.completion_id, exchange.client))

        def echo(prompt: int, ids: list[int]) -> str:
            given = body.prompt[prompt]
            return given if isinstance(given, str) and body.truncate_prompt_tokens is None else backend.tokenizer.decode(ids)

        return await respond(request, asks, body, CompletionAnswer, echo=echo if body.echo else None)

    @app.post(
        "/v1/chat/completions",
        response_model=doc.ChatCompletion,
        responses={
            **_CREATE,
            **doc.event_stream('data: {"id":"chatcmpl-1","object":"chat.completion.chunk",...}\n\ndata: [DONE]\n\n'),
        },
        tags=["OpenAI"],
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, through the model's own chat template."""
        exchange: Exchange = request.scope["exchange"]
        exchange.completion_id, exchange.prompt_field = new_id("chatcmpl"), "messages"
        ask = await unless_gone(request.receive, asker.chat(body, exchange.completion_id, exchange.client))
        return await respond(request, [ask], body, ChatAnswer, top_logprobs=body.top_logprobs or 0)


def _add_models(app: FastAPI, asker: Asker) -> None:
    def model(name: str) -> dict[str, Any]:
        card = asker.card
        return {
            "id": name,
            "object": "model",
            "created": card.created_s,
            "owned_by": "rowcast",
            "max_model_len": card.max_context,
            "vocab_size": card.vocab_size,
            "ladder": card.ladder,
            "mode": card.mode,
        }

    @app.get("/v1/models", response_model=doc.ModelList, responses=_READ, tags=["OpenAI"])
    async def models() -> Response:
        """The model that is served, under each of its names."""
        return _json(json_text({"object": "list", "data": [model(name) for name in asker.names]}))

    @app.get("/v1/models/{model_id:path}", response_model=doc.Model, responses={**_READ, **doc.errors(404)}, tags=["OpenAI"])
    async def one_model(model_id: str) -> Response:
        """The model of that name."""
        asker.check_model(model_id)
        return _json(json_text(model(model_id)))


def _add_tokens(app: FastAPI, asker: Asker) -> None:
    @app.post("/tokenize", response_model=doc.Tokens, responses=_CREATE, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the chat template writes it."""
        ids, texts = await asker.tokenize(body)
        found = {"count": len(ids), "max_model_len": asker.card.max_context, "tokens": ids, "token_strs": texts}
        return _json(json_text(found))

    @app.post("/detokenize", response_model=doc.Text, responses=_CREATE, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        return _json(json_text({"prompt": await asker.detokenize(body)}))


def _add_watching(app: FastAPI, backend: Backend, settings: AppSettings, log: RequestLog) -> None:
    viewers = 0
    latest: asyncio.Task[str] | None = None
    latest_s = float("-inf")

    async def snapshot() -> str:
        """One for all who watch."""
        nonlocal latest, latest_s
        now = time.monotonic()
        if latest is None or (latest.done() and now - latest_s > _LIVE_S / 2):
            latest, latest_s = asyncio.ensure_future(_text_of(backend.live())), now
        return await asyncio.shield(latest)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=doc.Health, responses=doc.errors(403, 503), tags=["watching"])
    async def health() -> Response:
        """Whether the process is alive, whatever its model does."""
        state, reason = backend.state()
        if state == "stopped":
            raise ApiError(503, f"the server has stopped: {reason}", kind="service_unavailable", code="unavailable")
        return _json(json_text({"status": "alive", "state": state}))

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        response_model=doc.Ready,
        responses={**doc.errors(403), 503: {"model": doc.NotReady, "description": "Why not."}},
        tags=["watching"],
    )
    async def ready() -> Response:
        """Whether requests are run now."""
        state, reason = backend.state()
        if state == "ready":
            return _json(json_text({"state": state}))
        error = ApiError(503, f"the server is {state}: {reason}", kind="service_unavailable", code="unavailable").to_json()
        return _json(json_text({**error, "state": state, "reason": reason}), 503, {"retry-after": "5"})

    @app.get("/version", response_model=doc.Version, responses=doc.errors(401, 403), tags=["watching"])
    async def version() -> Response:
        return _json(json_text({"version": __version__}))

    @app.get("/metrics", responses={**_READ, **doc.text("text/plain")}, response_class=Response, tags=["watching"])
    async def metrics() -> Response:
        """In Prometheus's text format."""
        return Response(await backend.metrics(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    @app.get("/live", response_model=dict[str, Any], responses=_READ, tags=["watching"])
    async def live() -> Response:
        """What the page at / shows, once."""
        return _json(await _text_of(backend.live()))

    @app.get(
        "/live/stream",
        responses={**_READ, **doc.errors(429), **doc.text("text/event-stream")},
        response_class=Response,
        tags=["watching"],
    )
    async def live_stream(request: Request) -> Response:
        """The same as server-sent events, four a second, until the server is shut down."""
        nonlocal viewers
        if viewers >= settings.max_viewers:
            raise ApiError(
                429, f"{viewers} others watch already, which is the most that this server allows: close one",
                kind="rate_limit_error", code="too_many_viewers", headers={"retry-after": "5"},
            )  # fmt: skip
        viewers += 1

        async def events() -> AsyncIterator[str]:
            while True:
                yield f"data: {await snapshot()}\n\n"
                if backend.state()[0] in ("draining", "stopped"):
                    return
                await asyncio.sleep(_LIVE_S)

        async def close() -> None:
            nonlocal viewers
            viewers -= 1

        return EventStream(events, close=close, exchange=request.scope["exchange"], log=log)


class _PageFiles(StaticFiles):
    """Browsers ask whether they have changed: an old module would not know a new page."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(_ASK_FIRST)
        return response


def _add_page(app: FastAPI) -> None:
    app.mount(PAGE_PATH.rstrip("/"), _PageFiles(directory=_PAGE, check_dir=False), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers=_ASK_FIRST)


async def _text_of(live: Coroutine[Any, Any, dict[str, Any]]) -> str:
    return json_text(await live)


async def _begun(backend: Backend, asks: list[Ask], exchange: Exchange) -> Running:
    """Requests whose first piece is there: until then an error has a status of its own."""
    running = await Running.start(backend, asks, exchange)
    try:
        return await running.wait()
    except BaseException:
        await running.aclose()
        raise


def _json(text: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    more = {"content-type": "application/json", "cache-control": "no-store", **(headers or {})}
    return Response(text.encode(), status, more)


async def _refused(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette say no to, in OpenAI's shape."""
    told = as_api_error(error)
    if isinstance(error, RequestValidationError):
        told = invalid_body(error.errors())
    elif isinstance(error, HTTPException):
        told = ApiError(
            error.status_code, _sentence(request, error), code=_CODES.get(error.status_code, "refused"), headers=error.headers
        )
    exchange: Exchange = request.scope["exchange"]
    exchange.error = told.code
    return _json(json_text(told.to_json()), told.status, told.headers)


_CODES = {400: "invalid_json", 404: "unknown_route", 405: "method_not_allowed"}


def _sentence(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no {request.method} {request.url.path[:80]} here: see GET /openapi.json"
    if error.status_code == 405:
        return f"{request.method} is not supported here, {(error.headers or {}).get('Allow', 'another method')} is"
    if error.status_code == 400:
        return "the body is not JSON that can be read"
    return str(error.detail)
