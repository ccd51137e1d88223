"""Text as windows of tokens: most of them to fit, the last ones of each text held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rowcast.errors import UserError

HELD_OUT = 0.05
"""Share of each text's windows."""


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


def read_windows(paths: Sequence[Path], encoder: Encoder, *, tokens: int, window: int) -> Windows:
    """At most `tokens` tokens in whole windows, evenly spread over the texts where they have more.

    Raises UserError for a text that cannot be read, is not UTF-8 or is empty, and where all of them have fewer than two windows.
    """
    if not paths:
        raise UserError("no text was given, name a file with --text")
    if window < 2:
        raise UserError(f"a window of {window} tokens holds no context, use 2 or more")
    if tokens < 2 * window:
        raise UserError(f"{tokens} tokens are fewer than two windows of {window}: raise --tokens or lower --window")
    texts: list[dict[str, str | int]] = []
    parts, found = [], 0
    for path in paths:
        text, digest = read_text(path)
        ids = torch.tensor(encoder.encode(text, add_special_tokens=False))
        found += len(ids)
        texts.append({"name": path.name, "tokens": len(ids), "sha256": digest})
        parts.append(ids[: len(ids) // window * window].view(-1, window))
    total = sum(map(len, parts))
    if total < 2:
        raise UserError(f"the text has {found} tokens, two windows of {window} are needed: give more text or lower --window")
    wanted = min(total, tokens // window)
    parts = [_spread(part, round(len(part) * wanted / total)) for part in parts]
    held = [round(len(part) * HELD_OUT) for part in parts]
    if not any(held):
        held[max(range(len(parts)), key=lambda i: len(parts[i]))] = 1
    fit = torch.cat([part[: len(part) - count] for part, count in zip(parts, held, strict=True)])
    return Windows(fit, torch.cat([part[len(part) - count :] for part, count in zip(parts, held, strict=True)]), texts)


def _spread(windows: Tensor, count: int) -> Tensor:
    # [W, window] -> [count, window]
    return windows[torch.arange(count) * len(windows) // max(1, count)]


def read_text(path: Path) -> tuple[str, str]:
    """The text and its SHA-256. Raises UserError where it cannot be read, is not UTF-8 or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the text {path} cannot be read ({error.strerror}), name a readable text file") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the text {path} is not UTF-8 at byte {error.start}, convert it to UTF-8") from None
    if not text.strip():
        raise UserError(f"the text {path} is empty, name a file that holds text")
    return text, hashlib.sha256(data).hexdigest()
