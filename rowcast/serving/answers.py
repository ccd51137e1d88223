"""Answers in OpenAI's shapes: pieces in; the chunks of a stream, or one whole object, out. Torch-free.

Nothing is validated here: every chunk is put together from text, since a server writes thousands of them a second.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from rowcast import __version__
from rowcast.runtime.outputs import Logprob, Logprobs
from rowcast.runtime.tokenizer import Tokenizer
from rowcast.serving.backend import ModelCard, Piece, Usage
from rowcast.serving.errors import json_text

TokenBytes = Callable[[int, str], list[int] | None]
"""(token id, its text) -> its bytes, as far as they can be told."""

DONE = "data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have; vLLM's."""


@dataclass(slots=True)
class Choice:
    """One sample of one prompt, as it grows."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    offset: int = 0
    """Characters of the tokens whose log-probabilities were written."""
    begun: bool = False
    """Something of it was written."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Answer:
    """One HTTP request's answer."""

    kind: Literal["chat.completion", "text_completion"]
    chunk_kind: str

    def __init__(
        self, completion_id: str, created_s: int, model: str, card: ModelCard, prompts: int, n: int,
        *, include_usage: bool = False, token_ids: bool = False, token_bytes: TokenBytes | None = None,
        hidden: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """`model`: as the client wrote it. `prompts` and `n`: how many, and how many answers to each. `token_ids`: tell them.
        `hidden`: ids of tokens that are not shown in the text."""
        self.choices = [Choice(index) for index in range(prompts * n)]
        self.usages: list[Usage | None] = [None] * prompts
        self.prompt_ids: list[list[int]] = [[] for _ in range(prompts)]
        self._n = n
        self._include_usage = include_usage
        self._tells_ids = token_ids
        self._token_bytes = token_bytes or (lambda _, text: list(text.encode()))
        self._hidden = hidden
        self._head = {"id": completion_id, "created": created_s, "model": model, "system_fingerprint": fingerprint(card)}
        start = json_text({**self._head, "object": self.chunk_kind})
        self._start = f"data: {start[:-1]},"
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"

    def take(self, prompt: int, piece: Piece, *, keep: bool) -> Choice:
        """Note a piece of prompt number `prompt`. `keep`: it is for one whole object."""
        choice = self.choices[prompt * self._n + piece.index]
        if piece.prompt_token_ids is not None:
            self.prompt_ids[prompt] = piece.prompt_token_ids
        if piece.usage is not None:
            self.usages[prompt] = piece.usage
        if keep:
            if not choice.begun:
                choice.texts.append(self._opening(prompt))
                choice.begun = True
            choice.texts.append(piece.text)
            choice.token_ids += piece.token_ids
            choice.logprobs += piece.logprobs or ()
        choice.finish_reason = piece.finish_reason or choice.finish_reason
        choice.stop_reason = piece.stop_reason if piece.finish_reason else choice.stop_reason
        return choice

    def events(self, prompt: int, piece: Piece) -> str:
        """What a stream says of a piece; empty for one without anything to say."""
        choice = self.take(prompt, piece, keep=False)
        found = ""
        if not choice.begun:
            choice.begun = True
            found = self._first(choice, prompt)
        if piece.text or piece.token_ids or piece.finish_reason is not None:
            found += self._event(choice, piece)
        return found

    def last_events(self) -> str:
        """The end of a stream."""
        if not self._include_usage:
            return DONE
        return f'{self._start}"choices":[],{self._cost()}}}\n\n{DONE}'

    @property
    def entries(self) -> int:
        """Log-probabilities that `whole` would write."""
        return sum(len(entry) for choice in self.choices for entry in choice.logprobs)

    def whole(self) -> str:
        """The object, all of whose pieces were kept."""
        wholes = [self._whole(choice) | ({"token_ids": choice.token_ids} if self._tells_ids else {}) for choice in self.choices]
        choices = ",".join(map(json_text, wholes))
        return f'{json_text({**self._head, "object": self.kind})[:-1]},"choices":[{choices}],{self._cost()}}}'

    def _cost(self) -> str:
        """The usage, and beside it what the engine says of each prompt's request."""
        usages = [usage for usage in self.usages if usage is not None]
        prompt, generated = sum(usage.prompt_tokens for usage in usages), sum(usage.generated_tokens for usage in usages)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        }
        stats = [usage.stats for usage in usages]
        return f'"usage":{json_text(usage)},"rowcast":{json_text(stats[0] if len(stats) == 1 else stats)}'

    def _opening(self, prompt: int) -> str:
        """Text that stands before the answer's own."""
        return ""

    def _first(self, choice: Choice, prompt: int) -> str:
        """What a stream says of a choice before its first piece."""
        return ""

    def _event(self, choice: Choice, piece: Piece) -> str:
        raise NotImplementedError

    def _whole(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _ending(self, choice: Choice, piece: Piece) -> str:
        ids = f',"token_ids":{json_text(piece.token_ids)}' if self._tells_ids else ""
        if piece.finish_reason is None:
            return f'"finish_reason":null{ids}'
        return f'"finish_reason":"{piece.finish_reason}","stop_reason":{json_text(choice.stop_reason)}{ids}'


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, *arguments: Any, top_logprobs: int = 0, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._top = top_logprobs

    def _first(self, choice: Choice, prompt: int) -> str:
        role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        return f'{self._start}"choices":[{{"index":{choice.index},{role}}}]{self._end}'

    def _event(self, choice: Choice, piece: Piece) -> str:
        delta = f'{{"content":{json_text(piece.text)}}}' if piece.text or piece.logprobs else "{}"
        logprobs = "null" if not piece.logprobs else json_text(self._logprobs(piece.token_ids, piece.logprobs))
        ending = self._ending(choice, piece)
        return f'{self._start}"choices":[{{"index":{choice.index},"delta":{delta},"logprobs":{logprobs},{ending}}}]{self._end}'

    def _whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, token_ids: Sequence[int], entries: Sequence[Logprobs]) -> dict[str, Any]:
        content = []
        for token, entry in zip(token_ids, entries, strict=True):
            best = sorted((found for found in entry.items() if found[1].rank <= self._top), key=lambda found: found[1].rank)
            content.append(
                {**self._token(token, entry[token]), "top_logprobs": [self._token(*found) for found in best[: self._top]]}
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, found: Logprob) -> dict[str, Any]:
        text = found.decoded_token or ""
        return {"token": text, "logprob": max(found.logprob, _LEAST_LOGPROB), "bytes": self._token_bytes(token, text)}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, *arguments: Any, echo: Callable[[int, list[int]], str] | None = None, **more: Any) -> None:
        """`echo`: (number of the prompt, its ids) -> its text; None: the answer's text does not begin with it."""
        super().__init__(*arguments, **more)
        self._echo = echo

    def _opening(self, prompt: int) -> str:
        return "" if self._echo is None else self._echo(prompt, self.prompt_ids[prompt])

    def _first(self, choice: Choice, prompt: int) -> str:
        text = self._opening(prompt)
        return self._chunk(choice, text, "null", '"finish_reason":null') if text else ""

    def _event(self, choice: Choice, piece: Piece) -> str:
        logprobs = "null" if not piece.logprobs else json_text(self._logprobs(choice, piece.token_ids, piece.logprobs))
        return self._chunk(choice, piece.text, logprobs, self._ending(choice, piece))

    def _chunk(self, choice: Choice, text: str, logprobs: str, ending: str) -> str:
        return f'{self._start}"choices":[{{"index":{choice.index},"text":{json_text(text)},"logprobs":{logprobs},{ending}}}]{self._end}'

    def _whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": "".join(choice.texts),
            "logprobs": self._logprobs(choice, choice.token_ids, choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _logprobs(self, choice: Choice, token_ids: Sequence[int], entries: Sequence[Logprobs]) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for token, entry in zip(token_ids, entries, strict=True):
            tokens.append(self._name(token, entry[token]))
            logprobs.append(max(entry[token].logprob, _LEAST_LOGPROB))
            tops.append({self._name(*found): max(found[1].logprob, _LEAST_LOGPROB) for found in entry.items()})
            offsets.append(choice.offset)
            choice.offset += 0 if token in self._hidden else len(entry[token].decoded_token or "")
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int, found: Logprob) -> str:
        """Its text; parts of a character as OpenAI writes them, so that two of them are two."""
        text = found.decoded_token or ""
        data = self._token_bytes(token, text) if "\ufffd" in text else None
        return text if data is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@cache
def fingerprint(card: ModelCard) -> str:
    """Changes whenever the same seed may give another answer: with the model, its ladder, its mode and the version."""
    told = f"{card.name} {card.vocab_size} {card.max_context} {card.ladder} {card.mode} {__version__}"
    return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12]


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """A token's bytes, where its text alone does not say them: byte-level and byte-fallback vocabularies have tokens that are a part of
    a character. None where they cannot be told."""

    def find(token: int, text: str) -> list[int] | None:
        if "\ufffd" not in text:
            return list(text.encode())
        piece = tokenizer.backend.id_to_token(token) or ""
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return [int(fallback[1], 16)]
        alphabet = _byte_alphabet()
        return [alphabet[character] for character in piece] if piece and all(c in alphabet for c in piece) else None

    return find


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level vocabularies write bytes: GPT-2's."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{chr(byte): byte for byte in kept}, **{chr(256 + at): byte for at, byte in enumerate(others)}}
