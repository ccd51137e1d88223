"""What is trained on: texts, their ends held out, and what the model itself wrote, as flat files of token ids that are mapped.

Which windows make a batch is a function of the seed and the step alone, so that a killed run goes on as it would have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rowcast.calibration.learning.state import write_whole
from rowcast.calibration.text import HELD_OUT, Encoder, begun, check_held_out, read_text, spread, tokens_before
from rowcast.errors import UserError

TEXT, TEXT_DESCRIPTION = "text.bin", "text.json"
LEAST_TOKENS = 8
"""Of a text, in a window."""


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """How ids lie on disk."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True, slots=True)
class Text:
    """One text in the flat file."""

    name: str
    sha256: str
    start: int
    held: int
    """Where its held-out part begins, ..."""
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(slots=True)
class Corpus:
    """Token windows, all of one size."""

    window: int
    ids: npt.NDArray[Any]
    """[N], mapped: all texts, without special tokens around them."""
    texts: list[Text]
    vocab_size: int
    seed: int
    text_share: float = 1.0
    """Of each batch's windows; the others are the model's own. Without written text all are from texts."""
    begins: tuple[int, ...] = ()
    """What every window and prompt begins with, as what the engine is given does: the tokenizer's BOS token, if it puts one there."""
    written: list[npt.NDArray[Any]] = field(default_factory=list)
    """[S, L] each, mapped, L at least the window."""
    _orders: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        texts: Sequence[Path],
        encoder: Encoder,
        vocab_size: int,
        *,
        window: int,
        seed: int = 0,
        held_out: Sequence[Path] = (),
        text_share: float = 1.0,
    ) -> Corpus:
        """Tokenise the texts into `folder`, once. `held_out`: texts that are judged by only; without any, the end of each text is.

        Raises UserError for a text that cannot be read, is not UTF-8, is empty or too short, for one that is learnt from and judged by,
        and for ids outside the vocabulary.
        """
        if not texts:
            raise UserError("no text was given, name a file with --text")
        read = [(path, *read_text(path)) for path in (*texts, *held_out)]
        digests = [(path, digest) for path, _, digest in read]
        check_held_out((digest for _, digest in digests[: len(texts)]), digests[len(texts) :])
        begins = tokens_before(read[0][1], encoder)
        if window < LEAST_TOKENS + len(begins):
            raise UserError(f"--window {window} is too short to learn from: give {LEAST_TOKENS + len(begins)} tokens or more")
        if max(begins, default=0) >= vocab_size:
            raise UserError(
                f"prompts begin with the token id {max(begins)}, the model has {vocab_size}: use the model's own tokenizer"
            )
        described = folder / TEXT_DESCRIPTION
        names = [[path.name, digest, place >= len(texts)] for place, (path, _, digest) in enumerate(read)]
        if not described.exists() or json.loads(described.read_bytes())["read"] != names:
            made = _tokenise(folder / TEXT, read, len(texts), 0 if held_out else window, encoder, vocab_size)
            write_whole(described, json.dumps({"texts": made, "read": names}, indent=2).encode())
        found = json.loads(described.read_bytes())
        ids = np.memmap(folder / TEXT, dtype=id_type(vocab_size), mode="r")
        corpus = cls(window, ids, [Text(**text) for text in found["texts"]], vocab_size, seed, text_share, begins)
        if not corpus._text_windows():
            most = max(text.held - text.start for text in corpus.texts)
            raise UserError(
                f"the longest text has {most} tokens to learn from, a window has {corpus._body} of them: give a longer text with "
                "--text or a shorter --window"
            )
        if not corpus.held(window, 1).numel():
            most = max(text.end - text.held for text in corpus.texts) + len(begins)
            fix = "give a longer one with --held-out"
            if not held_out:
                share = f"of one with fewer than {4 * window} only {HELD_OUT:.0%} is held out"
                fix = f"{share}, give a longer one with --text, one to judge by with --held-out"
            raise UserError(f"no held-out text has {window} tokens, the longest has {most}: {fix}, or lower --window")
        return corpus

    def add_written(self, path: Path, length: int) -> None:
        """Rows of `length` ids that the model wrote (`writing`)."""
        assert length >= self.window
        self.written.append(np.memmap(path, dtype=id_type(self.vocab_size), mode="r").reshape(-1, length))

    @property
    def written_tokens(self) -> int:
        return sum(rows.size for rows in self.written)

    def describe(self) -> list[dict[str, Any]]:
        """Name, tokens and SHA-256 of each text, and how many of its tokens are held out."""
        return [
            {"name": text.name, "tokens": text.tokens, "sha256": text.sha256, "held_out": text.end - text.held}
            for text in self.texts
        ]

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of one step, [size, window] int64, on the CPU: each epoch in another order, texts cut at other places."""
        share = self.text_share if self.written else 1.0
        before, after = round(step * size * share), round((step + 1) * size * share)
        rows = [self._text_window(n) for n in range(before, after)]
        rows += [self._written_window(n) for n in range(step * size - before, (step + 1) * size - after)]
        return torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows])

    def held(self, window: int, most: int) -> Tensor:
        """At most so many held-out windows of another size, evenly spread, [W, window] int64; none where no text is long enough."""
        found, body = [], max(1, window - len(self.begins))
        for text in self.texts:
            ids = torch.from_numpy(self.ids[text.held : text.end].astype(np.int64))
            found.append(ids[: len(ids) // body * body].view(-1, body))
        whole = torch.cat(found)
        return begun(spread(whole, min(most, len(whole))), self.begins)[:, :window]

    def prompts(self, count: int, tokens: int, number: int) -> Tensor:
        """`count` places of the texts to write on from, [count, tokens] int64: a function of the seed and `number`."""
        body = max(0, tokens - len(self.begins))
        draws = np.random.default_rng([self.seed, 1, number])
        spans = [(text.start, text.held - body) for text in self.texts if text.held - body > text.start]
        if not spans:
            raise UserError(f"no text has {tokens} tokens to write on from: give a longer text with --text")
        sizes = np.array([last - first for first, last in spans])
        chosen = draws.choice(len(spans), count, p=sizes / sizes.sum())
        starts = [spans[i][0] + int(draws.integers(sizes[i])) for i in chosen]
        rows = torch.stack([torch.from_numpy(self.ids[start : start + body].astype(np.int64)) for start in starts])
        return begun(rows, self.begins)[:, :tokens]

    @property
    def _body(self) -> int:
        """Tokens of a text in a window of it."""
        return self.window - len(self.begins)

    def _text_windows(self) -> list[int]:
        """Windows of each text. One less than fit, so that each epoch can begin elsewhere."""
        fit = [(text.held - text.start) // self._body for text in self.texts]
        return [max(count - 1, min(count, 1)) for count in fit] if any(fit) else []

    def _text_window(self, n: int) -> npt.NDArray[Any]:
        counts = self._text_windows()
        epoch, place = divmod(n, sum(counts))
        index = int(self._order("text", epoch, sum(counts))[place])
        ends = list(accumulate(counts))
        which = next(i for i, end in enumerate(ends) if index < end)
        text, inside = self.texts[which], index - (ends[which] - counts[which])
        slack = text.held - text.start - counts[which] * self._body
        phase = int(np.random.default_rng([self.seed, 2, epoch, which]).integers(slack + 1))
        start = text.start + phase + inside * self._body
        return np.concatenate([np.array(self.begins, self.ids.dtype), self.ids[start : start + self._body]])

    def _written_window(self, n: int) -> npt.NDArray[Any]:
        counts = [len(rows) * (rows.shape[1] // self.window) for rows in self.written]
        epoch, place = divmod(n, sum(counts))
        index = int(self._order("written", epoch, sum(counts))[place])
        for rows, count in zip(self.written, counts, strict=True):
            if index < count:
                row, part = divmod(index, rows.shape[1] // self.window)
                ids: npt.NDArray[Any] = rows[row, part * self.window : (part + 1) * self.window]
                return ids
            index -= count
        raise AssertionError("an order of more windows than there are")

    def _order(self, kind: str, epoch: int, count: int) -> Tensor:
        key = (kind, epoch)
        if key not in self._orders or len(self._orders[key]) != count:
            for old in [other for other in self._orders if other[0] == kind and other[1] < epoch - 1]:
                del self._orders[old]
            generator = torch.Generator().manual_seed((self.seed << 24) + (epoch << 1) + (kind == "text"))
            self._orders[key] = torch.randperm(count, generator=generator)
        return self._orders[key]


def _tokenise(
    path: Path, read: Sequence[tuple[Path, str, str]], learnt: int, window: int, encoder: Encoder, vocab_size: int
) -> list[dict[str, Any]]:
    """Write all texts' ids to `path`; where each lies, as `Text`. `learnt`: so many are learnt
    from. `window`: held out at least of each that has four; 0: nothing of them is."""
    parts: list[npt.NDArray[Any]] = []
    texts: list[dict[str, Any]] = []
    start = 0
    for number, (file, text, digest) in enumerate(read):
        ids = np.array(encoder.encode(text, add_special_tokens=False), dtype=np.int64)
        if len(ids) and int(ids.max()) >= vocab_size:
            raise UserError(
                f"the text {file} has the token id {int(ids.max())}, the model has {vocab_size}: use the model's own tokenizer"
            )
        end = start + len(ids)
        kept = round(len(ids) * HELD_OUT) if len(ids) < 4 * window else max(window, round(len(ids) * HELD_OUT))
        held = start if number >= learnt else end - (kept if window else 0)
        parts.append(ids.astype(id_type(vocab_size)))
        texts.append({"name": file.name, "sha256": digest, "start": start, "held": held, "end": end})
        start = end
    write_whole(path, np.concatenate(parts).tobytes())
    return texts
