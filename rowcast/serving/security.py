"""Who may ask: API keys, hosts and origins, and how much a body may hold. Torch-free."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import stat
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rowcast.errors import UserError
from rowcast.serving.errors import ApiError, ClientGone, as_api_error, json_text
from rowcast.serving.logs import UNMATCHED, Exchange, RequestLog

log = logging.getLogger("rowcast")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OnAnswer = Callable[[str, int], None]
"""(route, status) of each answer; for metrics."""

MIN_KEY_CHARS = 16
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Served without a key, with all that lies below `PAGE_PATH`."""
PAGE_PATH = "/page/"

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_DISCARD_BYTES = 64 << 20
"""Of a body that is too large, this much is read and dropped, so that its sender gets to read why."""
_DISCARD_S = 5.0

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who a key belongs to; of the key itself only a digest is kept."""

    name: str
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, key: str) -> ApiKey:
        """Raises UserError, which never holds the key."""
        if not _NAME.fullmatch(name):
            raise UserError(f"the name of an API key is {name[:64]!r}: use 1 to 64 letters, digits, dots, hyphens, underscores")
        if len(key) < MIN_KEY_CHARS or not _KEY.fullmatch(key):
            raise UserError(
                f"the API key of {name} has {len(key)} characters: use at least {MIN_KEY_CHARS} letters, digits or ._~+/=- in it"
            )
        return cls(name, hashlib.sha256(key.encode()).digest())


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file, one a line, as `name:key` or `key`; blank lines and lines that begin with # are skipped.

    Keys without a name are called after their line, key-1 and so on. Raises UserError for a file that cannot be read or holds none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
        readable = bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the API keys in {path} cannot be read: {type(error).__name__}") from None
    if readable:
        log.warning("%s holds API keys and other users of this machine can read or change it: chmod 600", path)
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            name, colon, key = line.partition(":")
            found = ApiKey.of(name.strip(), key.strip()) if colon else ApiKey.of(f"key-{number}", line)
            if found.name in keys or found.digest in {each.digest for each in keys.values()}:
                raise UserError(f"line {number} of {path} has the name or the key of an earlier one: each has to be given once")
            keys[found.name] = found
    if not keys:
        raise UserError(f"{path} holds no API key: write one a line, as name:key")
    return tuple(keys.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class AppSettings:
    """What the HTTP side allows. Raises UserError for what would leave the server open."""

    model_names: tuple[str, ...] = ()
    """By which requests may call the model; empty: the backend's name for it."""
    api_keys: tuple[ApiKey, ...] = ()
    host: str = "127.0.0.1"
    """The address that the server is bound to. Any but a loopback one needs keys."""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside the loopback ones under which a loopback server may be called, behind a proxy for example."""
    allowed_origins: tuple[str, ...] = ()
    """Of other web pages that may call the API from a browser, as "https://example.org"."""
    max_body_bytes: int | None = None
    """None: 32 bytes for each token of the context, at least 1 MiB."""
    body_timeout_s: float = 30.0
    """In which a body has to arrive."""
    max_choices: int = 128
    """Prompts of a request times `n`."""
    max_viewers: int = 32
    """Of /live/stream, at the same time."""
    log_requests: bool = True
    """A JSON line for each, on standard error."""

    def __post_init__(self) -> None:
        if not self.loopback and not self.api_keys:
            raise UserError(
                f"host={self.host} lets other machines call the server: give API keys (--api-key-file), or bind it to 127.0.0.1"
            )
        for origin in self.allowed_origins:
            if not re.fullmatch(r"https?://[^/\s*A-Z]+", origin):
                raise UserError(
                    f"the allowed origin {origin!r:.60} is none: write it as https://example.org, in lower case and without a path"
                )
        for name, value in (("max_body_bytes", self.max_body_bytes), ("max_choices", self.max_choices)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value} has to be at least 1")

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine for itself only, without asking anybody."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def host_name(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


class Guard:
    """ASGI middleware, around everything else: ids, keys, hosts, bodies, errors in OpenAI's shape, a line in the log.

    It reads the whole body before the application begins, so that a slow sender takes nothing but a connection. `scope["exchange"]` is
    where the application notes what the log is to say.
    """

    def __init__(
        self, app: App, *, settings: AppSettings, log: RequestLog, max_body_bytes: Callable[[], int], on_answer: OnAnswer | None
    ) -> None:
        self._app = app
        self._settings = settings
        self._log = log
        self._max_body_bytes = max_body_bytes
        self._on_answer = on_answer
        self._routes: frozenset[str] = frozenset()
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        exchange = Exchange(request_id, scope["method"])
        scope["exchange"] = exchange
        more = [(b"x-request-id", request_id.encode()), *_HEADERS]

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        try:
            await self._answer(scope, headers, exchange, receive, send_on)
        except ClientGone:
            exchange.status = 499
        except Exception as error:
            told = as_api_error(error, request_id, exchange.prompt_field)
            if told.status == 500 and told.code == "internal":
                self._log.failure(error, request_id)
            exchange.error = told.code
            if not exchange.status:
                await send_error(told, send_on)
        finally:
            exchange.status = exchange.status or 499
            exchange.route = getattr(scope.get("route"), "path", None) or self._route(scope)
            self._log.request(exchange)
            if self._on_answer is not None:
                self._on_answer(exchange.route, exchange.status)

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange, receive: Receive, send: Send) -> None:
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        try:
            self._check_place(scope["headers"])
            exchange.client = self._client(scope, headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                _check_type(headers)
        except ApiError as error:
            if unread:
                error.headers["connection"] = "close"
            raise
        if scope["method"] in ("POST", "PUT", "PATCH"):
            receive = await self._read(headers, receive)
        await self._app(scope, receive, send)

    def _route(self, scope: Scope) -> str:
        """Of a request that never came to its route."""
        self._routes = self._routes or frozenset(getattr(route, "path", "") for route in scope["app"].routes)
        path = _path(scope)
        return path if path in self._routes else UNMATCHED

    def _check_place(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """A page of elsewhere must not reach a loopback server, neither by a name that it made point here nor as another origin."""
        if not self._settings.loopback:
            return
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        for host in hosts:
            name = host_name(host)
            if not (is_loopback(name) or name in self._hosts or host in self._hosts):
                raise ApiError(
                    403,
                    f"this server is not known as {name[:60]!r}: call it by 127.0.0.1, or start it with --allowed-host",
                    code="host_refused",
                )
        given = dict(headers)
        elsewhere = given.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and given.get(b"sec-fetch-mode") != b"navigate"
        if elsewhere and b"origin" not in given:  # an image, say, whose address is one of the API's: browsers send no origin then
            raise ApiError(403, "pages of other sites may not call this server", code="origin_refused")
        for header, value in headers:
            if header == b"origin":
                origin = value.decode("latin-1").lower()
                own = [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts]
                if origin not in own and origin not in self._origins:
                    sentence = f"pages of {origin[:60]!r} may not call this server: start it with --allowed-origin"
                    raise ApiError(403, sentence, code="origin_refused")

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose request it is. Raises ApiError without a key where one is needed."""
        path = _path(scope)
        if self._settings.api_keys and path not in OPEN_PATHS and not path.startswith(PAGE_PATH):
            return self._owner(headers.get(b"authorization"))
        address = scope.get("client")
        return str(address[0]) if address else ""

    def _owner(self, authorization: bytes | None) -> str:
        wanted = {"www-authenticate": "Bearer"}
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            sentence = "no API key was given: send it as Authorization: Bearer KEY"
            raise ApiError(401, sentence, code="invalid_api_key", headers=wanted)
        digest = hashlib.sha256(key.strip()).digest()
        found = None
        for each in self._settings.api_keys:  # All of them, so that the time tells nothing.
            if hmac.compare_digest(each.digest, digest):
                found = each.name
        if found is None:
            raise ApiError(401, "the API key is not one of this server's", code="invalid_api_key", headers=wanted)
        return found

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the body; what the application may read it from. Raises ApiError where it is too large or too slow."""
        most = self._max_body_bytes()
        length = headers.get(b"content-length", b"")
        known = int(length) if length.isdigit() and len(length) < 20 else 0
        body = b"" if known > most else await self._within(_body(receive, most))
        if body is None or known > most:
            if headers.get(b"expect", b"").lower() != b"100-continue":
                await _discard(receive)
            raise ApiError(
                413, f"the body has more than {most} bytes, which is the most that this server reads: send less",
                code="body_too_large", headers={"connection": "close"},
            )  # fmt: skip
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal message
            if message is not None:
                first, message = message, None
                return first
            return await receive()

        return replay

    async def _within(self, reading: Awaitable[bytes | None]) -> bytes | None:
        limit_s = self._settings.body_timeout_s
        try:
            return await asyncio.wait_for(reading, limit_s)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {limit_s:g} s", code="request_timeout", headers={"connection": "close"}
            ) from None


async def _body(receive: Receive, most: int) -> bytes | None:
    """All of it; None where it has more than `most` bytes. What Content-Length says is not believed."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read on and drop it, within bounds."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_body_dropped(receive), _DISCARD_S)


async def _body_dropped(receive: Receive) -> None:
    size = 0
    while size < _DISCARD_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _path(scope: Scope) -> str:
    """As the routes see it: without the prefix under which the application is mounted."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path


def _check_type(headers: dict[bytes, bytes]) -> None:
    """JSON only: browsers send no other site's JSON without asking first."""
    given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if given != b"application/json":
        shown = given.decode("latin-1")[:60] or "missing"
        raise ApiError(415, f"the Content-Type is {shown}: send application/json", code="unsupported_media_type")


async def send_error(error: ApiError, send: Send) -> None:
    """The whole response."""
    body = json_text(error.to_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
