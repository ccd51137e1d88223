"""The page at /, in a headless Chromium: a conversation by keyboard alone, and a server that goes, asks for a key or refuses."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from http_serving import Served, character_model, engine
from page_checks import FOCUSED, NAMELESS, PALE, PICTURE, REACHABLE
from warm_ranks import WarmLauncher

from rowcast.serving.app import make_app
from rowcast.serving.security import ApiKey, AppSettings

playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
WAIT_MS = 60_000
"""For what takes a second on a machine that is not busy."""
SPARSE = "ngram / self:mlp=0.4,by=gate,gamma=2 / plain"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(CHROMIUM)} is installed")
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[str]:
    """`rowcast serve` with a ladder that has a sparse rung; its address."""
    command = [sys.executable, "-m", "rowcast", "serve", "--port", "0", "--no-log-requests", "--max-model-len", "512"]
    process = subprocess.Popen([*command, "--ladder", SPARSE], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if "listening at " in line:
                break
        assert said and "listening at " in said[-1], said
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it is never full
        yield said[-1].partition("listening at ")[2].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model, without a port."""
    launcher = WarmLauncher()
    with engine(character_model(tmp_path_factory.mktemp("characters")), launcher) as found:
        yield found
    launcher.close()


@pytest.fixture(scope="module")
def tiny(service: Served) -> Iterator[str]:
    with service.at(AppSettings(log_requests=False)) as served:
        yield served.url


@contextmanager
def opened(
    browser: Any, url: str, *, expected: tuple[str, ...] = (), settings: dict[str, str] | None = None, **context: Any
) -> Iterator[Any]:
    """The page, with `settings` by their ids. At the end: nothing went wrong but what is `expected`, and it asked no other host."""
    made = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "color_scheme": "light", **context})
    page = made.new_page()
    page.set_default_timeout(WAIT_MS)
    page.add_init_script(f"sessionStorage.setItem('rowcast.settings', {json.dumps(json.dumps(settings or {}))})")
    wrong: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/page")[0].split("/v1")[0].split("/live")[0].rstrip("/")))
    try:
        answer = page.goto(url)
        assert "unsafe" not in answer.headers["content-security-policy"]
        yield page
        assert hosts == {url}
        assert [text for text in wrong if not any(re.search(each, text) for each in expected)] == []
    finally:
        made.close()


def ready(page: Any) -> None:
    page.locator("#state[data-state=ready]").wait_for()


def until(page: Any, locator: str, pattern: str) -> str:
    """The element's text, once it matches."""
    playwright_api.expect(page.locator(locator)).to_have_text(re.compile(pattern, re.DOTALL), timeout=WAIT_MS)
    return str(page.locator(locator).text_content())


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def limit(page: Any, tokens: int) -> None:
    """Most tokens of the next answers."""
    page.locator("#settings").evaluate("details => details.open = true")
    page.get_by_label("Most tokens").fill(str(tokens))


def sent(request: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.post_data)
    return found


def test_a_conversation_by_keyboard_alone(browser: Any, smollm2: str) -> None:
    with opened(browser, smollm2, settings={"temperature": "0"}) as page:
        ready(page)
        assert page.title() == "SmolLM2-135M-Instruct · Rowcast"
        with page.expect_request("**/v1/chat/completions") as first:  # the message field has the focus from the start
            page.keyboard.type("Write a long story about a lighthouse.")
            page.keyboard.press("Shift+Enter")
            page.keyboard.type("Begin at once.")
            page.keyboard.press("Enter")
        assert sent(first.value)["messages"] == [
            {"role": "user", "content": "Write a long story about a lighthouse.\nBegin at once."}
        ]
        begun = until(page, ".turn.assistant .body", r"\S")
        assert "Once upon a time".startswith(begun[:16])
        until(page, ".turn.assistant .body", rf"^{re.escape(begun)}.{{4}}")  # it grows, and is not over

        until(page, "#pace", r"[1-9]")
        assert until(page, "#counts div:first-child dd", "1")
        until(page, "#density p.fine", r"^self used 40% of the neurons in every layer\.$")
        width, colours = page.locator("#density canvas").evaluate(PICTURE)
        assert width > 100 and colours >= 1
        assert "of what plain decoding would read" in until(page, "#bytes", r"\d+%")
        until(page, "#acceptance", r"self.*\d+%")
        until(page, "#memory", r"cpu.*GiB")

        page.keyboard.press("Escape")
        until(page, ".turn.assistant .note", r"^Stopped\.$")
        until(page, "#counts div:first-child dd", "0")  # on the server, too
        stopped = page.locator(".turn.assistant .body").text_content()
        assert page.evaluate("() => document.activeElement.id") == "prompt"

        page.keyboard.press("Tab")  # Send
        page.keyboard.press("Tab")  # Settings
        page.keyboard.press("Enter")
        for label, value in (("Most tokens", "6"), ("Seed", "7"), ("Temperature", "0.5")):
            page.get_by_label(label).focus()
            page.keyboard.press("ControlOrMeta+a")
            page.keyboard.type(value)
        page.get_by_label("ngram").focus()
        page.keyboard.press("Space")
        page.get_by_role("button", name="Regenerate").focus()
        with page.expect_request("**/v1/chat/completions") as again:
            page.keyboard.press("Enter")
        body = sent(again.value)
        assert (body["max_tokens"], body["seed"], body["temperature"]) == (6, 7, 0.5)
        assert body["ladder"] == "self:mlp=0.4,by=gate,gamma=2 / plain"
        until(page, ".turn.assistant .costs", r"tokens6")
        assert page.locator(".turn.assistant").count() == 1
        assert page.locator(".turn.assistant .body").text_content() != stopped
        page.get_by_role("button", name="Copy the answer").focus()
        page.keyboard.press("Enter")
        until(page, ".turn.assistant .row button:first-child", "Copied|Not copied")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, tiny: str, scheme: str) -> None:
    """In both themes, chosen by the system or by hand, and 360 pixels wide."""
    with opened(browser, tiny, color_scheme=scheme, reduced_motion="reduce") as page:
        ready(page)
        limit(page, 24)
        ask(page, "Hello")
        page.locator(".costs").wait_for()
        until(page, "#memory", "GiB|MiB")
        assert page.evaluate(PALE) == []
        dark = "() => getComputedStyle(document.body).color.match(/\\d+/g).map(Number)[0] > 128"
        assert page.evaluate(dark) is (scheme == "dark")
        for name in ("light", "dark"):
            page.get_by_role("button", name="Theme").click()
            assert page.get_by_role("button", name="Theme").text_content() == f"Theme: {name}"
            assert page.evaluate(dark) is (name == "dark")
            assert page.evaluate(PALE) == []
        page.reload()
        assert page.evaluate(dark) is True  # what was chosen is kept
        ready(page)
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        page.get_by_role("button", name="Live").click()
        page.locator("#live").wait_for()
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        assert page.evaluate(PALE) == []


def test_all_has_a_name_and_is_reached(browser: Any, tiny: str) -> None:
    with opened(browser, tiny) as page:
        ready(page)
        limit(page, 24)
        ask(page, "Hello")
        page.locator(".costs").wait_for()
        until(page, "#memory", "GiB|MiB")
        assert page.evaluate(NAMELESS) == []
        assert page.locator("main").count() == page.locator("aside").count() == page.locator("header").count() == 1
        assert page.locator("[role=status]").get_attribute("aria-live") == "polite"
        page.evaluate("() => document.activeElement.blur()")
        wanted = page.evaluate(REACHABLE)
        reached = 0
        for _ in range(wanted + 4):
            page.keyboard.press("Tab")
            nowhere, seen, reached = page.evaluate(FOCUSED)
            assert nowhere or seen
        assert reached >= wanted
        page.get_by_role("button", name="Pause").press("Enter")
        assert page.get_by_role("button", name="Pause").get_attribute("aria-pressed") == "true"


def test_nothing_that_is_written_becomes_a_part_of_the_page(browser: Any, tiny: str) -> None:
    evil = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    code = f"Look:\n```html\n{evil}\n```\nand `<b>this</b>`."
    parts = re.findall("(?s).{1,5}", code)
    events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in parts]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    with opened(browser, tiny) as page:
        ready(page)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
        ask(page, evil)
        page.get_by_role("button", name="Regenerate").wait_for()
        assert page.locator(".turn.user .body").text_content() == evil
        assert page.locator(".turn.assistant pre code").text_content() == evil
        assert page.locator(".turn.assistant p code").text_content() == "<b>this</b>"
        assert page.locator("#turns :is(script, img, b)").count() == 0
        assert page.evaluate("() => window.hit") is None


@contextmanager
def listening(service: Served, port: int = 0) -> Iterator[int]:
    """The service at a port, as `Served.at`, but one that may be had again."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    bound.listen()  # who comes before the server is up waits
    app = make_app(service.service, AppSettings(log_requests=False))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=0))
    running = asyncio.run_coroutine_threadsafe(server.serve(sockets=[bound]), service._loop)
    try:
        yield int(bound.getsockname()[1])
    finally:
        server.should_exit = True
        running.result(60)


def test_a_server_that_goes_and_comes_back(browser: Any, service: Served) -> None:
    lost = r"ERR_(CONNECTION_REFUSED|INCOMPLETE_CHUNKED_ENCODING|CONNECTION_RESET|EMPTY_RESPONSE)"
    with ExitStack() as first:
        port = first.enter_context(listening(service))
        with opened(browser, f"http://127.0.0.1:{port}", expected=(lost,)) as page:
            ready(page)
            limit(page, 12)
            ask(page, "Hello")
            page.locator(".costs").wait_for()
            first.close()
            page.locator("#state[data-state=unreachable]").wait_for()
            until(page, "#notice", "cannot be reached")
            until(page, "#said", "cannot be reached")
            until(page, "#live-title", "Last figures")
            assert page.evaluate(PALE) == []
            ask(page, "Still")
            until(page, ".note.wrong", "cannot be reached")
            ask(page, "there?")
            until(page, ".turn:last-child .note.wrong", "cannot be reached")
            with listening(service, port):
                ready(page)
                until(page, "#live-title", "Live")
                until(page, "#said", "is ready")
                with page.expect_request("**/v1/chat/completions") as request:
                    page.get_by_role("button", name="Try again").click()
                said = sent(request.value)["messages"]
                assert [message["role"] for message in said] == ["user", "assistant", "user"]
                assert said[-1]["content"] == "Still\n\nthere?", "templates want turns to alternate"
                page.locator(".turn:last-child .costs").wait_for()


def test_a_server_with_keys(browser: Any, service: Served) -> None:
    key = "a-key-of-forty-characters-0123456789abcd"
    settings = AppSettings(api_keys=(ApiKey.of("reader", key),), log_requests=False)
    with service.at(settings) as served, opened(browser, served.url, expected=("401",)) as page:
        page.locator("#state[data-state=locked]").wait_for()
        until(page, "#notice", "asks for an API key")
        playwright_api.expect(page.get_by_label("API key")).to_be_focused(timeout=WAIT_MS)
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        ready(page)
        limit(page, 4)
        ask(page, "Hello")
        page.locator(".costs").wait_for()
        assert page.evaluate("() => JSON.stringify([{ ...localStorage }, document.cookie])").find(key) < 0
        assert page.evaluate("() => sessionStorage.getItem('rowcast.key')") == key


def test_a_refusal_is_told(browser: Any, tiny: str) -> None:
    error = {"error": {"message": "9 requests wait already: try again in 7 s", "type": "rate_limit_error", "code": "queue_full"}}
    headers = {"retry-after": "7", "content-type": "application/json"}
    with opened(browser, tiny, expected=("429",)) as page:
        ready(page)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, headers=headers, body=json.dumps(error)))
        ask(page, "Hello")
        until(page, ".note.wrong", r"^9 requests wait already: try again in 7 s\.$")
        page.unroute("**/v1/chat/completions")
        limit(page, 4)
        page.get_by_label("Temperature").fill("9")
        page.get_by_role("button", name="Try again").click()
        playwright_api.expect(page.get_by_label("Temperature")).to_be_focused(timeout=WAIT_MS)
        page.get_by_label("Temperature").fill("1")
        page.get_by_role("button", name="Try again").click()
        page.locator(".costs").wait_for()


def test_the_dashboard_finds_its_metrics(service: Served) -> None:
    """Those of docs/grafana/rowcast.json, whose panels `test_grafana` looks at, in a live server's /metrics."""
    told = service.call(service.service.metrics).decode()
    families = dict(re.findall(r"^# TYPE (\w+) (\w+)$", told, re.MULTILINE))
    exported = {f"{name}_bucket" if kind == "histogram" else name for name, kind in families.items()}
    dashboard = (Path(__file__).parent.parent / "docs" / "grafana" / "rowcast.json").read_text(encoding="utf-8")
    asked = set(re.findall(r"\browcast_\w+(?=[{])", dashboard))
    assert len(asked) > 20 and asked <= exported, asked - exported
