"""Text as windows of tokens: most of them to fit, the last ones of each text held out. Each begins as what the engine is given does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rowcast.errors import UserError

HELD_OUT = 0.05
"""Share of each text's windows."""
LEAST_HELD = 2
"""Windows, where the text has so many beside one to fit: one to choose by, one to report on."""
LEAST_WINDOW = 3
"""Tokens of a text: a prompt of one, which runs dense, one that runs sparse, and the one that it is to predict."""
PROBE_CHARACTERS = 100


class Encoder(Protocol):
    """The part of a tokenizer that this needs."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Windows:
    """Neighbouring tokens of some texts, all windows of one size; int64."""

    fit: Tensor
    """[W, window]."""
    held: Tensor
    """[V, window]: the last windows of the texts."""
    texts: list[dict[str, str | int]]
    """Name, tokens and SHA-256 of each."""
    begins: tuple[int, ...] = ()
    """What every window begins with (`tokens_before`): it only gives context."""

    @property
    def settings(self) -> dict[str, list[int]]:
        """What a command records of them, so that what was made of windows that begin otherwise does not go on."""
        return {"windows_begin_with": list(self.begins)} if self.begins else {}


def tokens_before(text: str, encoder: Encoder) -> tuple[int, ...]:
    """What an encoder puts before a prompt: a BOS token, as those of Llama, Mistral and OPT do, or nothing. `text`: any that is one."""
    some = text.strip()[:PROBE_CHARACTERS]
    bare, whole = encoder.encode(some, add_special_tokens=False), encoder.encode(some)
    places = range(len(whole) - len(bare) + 1)
    return next((tuple(whole[:place]) for place in places if whole[place : place + len(bare)] == bare), ())


def begun(rows: Tensor, begins: Sequence[int]) -> Tensor:
    """Tokens behind what they begin with: [W, n] -> [W, len(begins) + n]."""
    return torch.cat([torch.tensor(begins, dtype=rows.dtype).expand(len(rows), -1), rows], 1)


def read_windows(paths: Sequence[Path], encoder: Encoder, *, tokens: int, window: int, option: str = "--text") -> Windows:
    """At most `tokens` tokens in whole windows, what they begin with among them, evenly spread over the texts where they have more.
    `option`: that names the texts.

    Raises UserError for a text that cannot be read, is not UTF-8 or is empty, and where all of them have fewer than two windows.
    """
    if not paths:
        raise UserError("no text was given, name a file with --text")
    read = [(path, *read_text(path)) for path in paths]
    begins = tokens_before(read[0][1], encoder)
    least, body = LEAST_WINDOW + len(begins), window - len(begins)
    if window < least:
        raise UserError(f"a window of {window} tokens leaves none to judge by, use {least} or more")
    if tokens < 2 * window:
        raise UserError(f"{tokens} tokens are fewer than two windows of {window}: raise --tokens or lower --window")
    texts: list[dict[str, str | int]] = []
    parts, found = [], 0
    for path, text, digest in read:
        ids = torch.tensor(encoder.encode(text, add_special_tokens=False))
        found += len(ids)
        texts.append({"name": path.name, "tokens": len(ids), "sha256": digest})
        parts.append(ids[: len(ids) // body * body].view(-1, body))
    total = sum(map(len, parts))
    if total < 2:
        said = f"the text {paths[0]} has" if len(paths) == 1 else f"the {len(paths)} texts of {option} have"
        raise UserError(
            f"{said} {found} tokens, two windows of {body} are needed: give more text with {option} or lower --window"
        )
    wanted = min(total, tokens // window)
    ends = [round(wanted * end / total) for end in accumulate(map(len, parts), initial=0)]
    parts = [spread(part, end - start) for part, (start, end) in zip(parts, pairwise(ends), strict=True)]
    held = [round(len(part) * HELD_OUT) for part in parts]
    while sum(held) < min(LEAST_HELD, wanted - 1):
        held[max(range(len(parts)), key=lambda i: len(parts[i]) - held[i])] += 1
    fit = torch.cat([part[: len(part) - count] for part, count in zip(parts, held, strict=True)])
    last = torch.cat([part[len(part) - count :] for part, count in zip(parts, held, strict=True)])
    return Windows(begun(fit, begins), begun(last, begins), texts, begins)


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` of them, evenly spread: [W, window] -> [count, window]."""
    return windows[torch.arange(count) * len(windows) // max(1, count)]


def check_held_out(learnt: Iterable[str], held: Iterable[tuple[Path, str]]) -> None:
    """Raise UserError for a text that is judged by, with its SHA-256 in `held`, and also learnt from, by the SHA-256 in `learnt`."""
    digests = set(learnt)
    for path, digest in held:
        if digest in digests:
            raise UserError(f"the text {path} is to be learnt from and to judge by: give another one with --held-out")


def read_text(path: Path) -> tuple[str, str]:
    """The text, with every line break as "\\n", and its bytes' SHA-256.

    Raises UserError where it cannot be read, is not UTF-8 or is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the text {path} cannot be read ({error.strerror}), name a readable text file") from None
    try:
        text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the text {path} is not UTF-8 at byte {error.start}, convert it to UTF-8") from None
    if not text.strip():
        raise UserError(f"the text {path} is empty, name a file that holds text")
    return text, hashlib.sha256(data).hexdigest()
