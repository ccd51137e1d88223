"""Pictures of the page for docs/images: a server with SmolLM2, a conversation, and the page as it is while an answer is generated.

python tools/screenshots.py [--out docs/images] [--url http://127.0.0.1:8000/]

Needs `pip install "rowcast[serve]" playwright` and a Chromium of the machine's.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
WIDTH, HEIGHT = 1440, 1040
LADDER = "ngram / self:mlp=0.4,gamma=3 / plain"
SYSTEM = "You are a helpful assistant. Answer in two or three sentences."
TALK = (
    ("Why is the sky blue?", 150),
    ("Write a Python function that says whether a number is prime, then one that lists all primes below n.", 400),
)
"""Questions, and the most tokens of their answers."""
MOST_BYTES = 250_000
WAIT_MS = 300_000


@contextmanager
def server(arguments: list[str]) -> Iterator[str]:
    """Its address, while it runs."""
    command = [sys.executable, "-m", "rowcast", "serve", "SmolLM2-135M-Instruct", "--port", "0", "--no-log-requests", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if "listening at " in line:
                yield line.partition("listening at ")[2].strip()
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.close()
        process.wait()


def take(url: str, out: Path) -> None:
    """One picture a theme, each in the middle of an answer."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        raise SystemExit(f"none of {', '.join(CHROMIUM)} is installed")
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(url)
        page.locator("#state[data-state=ready]").wait_for()
        settings = page.locator("#settings summary")
        settings.click()
        page.get_by_label("System prompt").fill(SYSTEM)
        page.get_by_label("Temperature").fill("0.2")
        page.get_by_label("Seed").fill("1")
        settings.click()
        for number, (text, tokens) in enumerate(TALK):
            settings.click()
            page.get_by_label("Most tokens").fill(str(tokens))
            settings.click()
            page.get_by_label("Message", exact=True).fill(text)
            page.keyboard.press("Enter")
            if number < len(TALK) - 1:
                page.locator(".turn.assistant .row").nth(number).wait_for(timeout=WAIT_MS)
        page.mouse.move(0, 0)
        page.locator(".turn.busy .code").first.wait_for(timeout=WAIT_MS)
        for _ in range(8):  # lines of code
            page.wait_for_timeout(1000)
            if page.locator(".turn.busy pre").first.inner_text().count("\n") > 6:
                break
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.wait_for_timeout(600)  # the next snapshot draws the heat map in the theme's colours
            path = out / f"serving-{theme}.png"
            page.screenshot(path=path)
            print(f"{path}: {path.stat().st_size} bytes")
            if path.stat().st_size > MOST_BYTES:
                raise SystemExit(f"{path} is larger than {MOST_BYTES} bytes")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("arguments", nargs="*", help=f"for `rowcast serve`; without any, --ladder {LADDER!r}")
    given = parser.parse_args()
    if given.url:
        take(given.url, given.out)
    else:
        with server(given.arguments or ["--ladder", LADDER]) as url:
            take(url, given.out)


if __name__ == "__main__":
    main()
