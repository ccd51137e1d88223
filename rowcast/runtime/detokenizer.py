"""Text as it grows, one token at a time: complete characters only, cut at the first stop string.

One `Detokenizer` belongs to one output sequence. It knows tokens and text, not requests: whoever generates decides when stop
strings count (`min_tokens`) and what to do with a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rowcast.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
"""A character takes at most four tokens, so that many hold a whole one in any text."""
_INCOMPLETE = 3
"""Bytes, and so characters U+FFFD, of an incomplete character at most. All before those are what they will stay."""
_KEPT_TOKENS = _INCOMPLETE * 3 + 1
"""That many hold `_INCOMPLETE` characters U+FFFD, each of three bytes at most, and a token before them."""
_MOST_TOKENS = 2 * _KEPT_TOKENS


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string ended the text."""

    stop: str


class Detokenizer:
    """The text of a growing list of token ids, and how much of it may be shown.

    The text is `Tokenizer.decode` of all tokens pushed, cut at the first stop string, however the text is spread over tokens. The
    first is the one that is complete first; of several that end at the same character, the longest. Without
    `include_stop_str_in_output` the cut is before it, else behind it.

    With `prompt_ids` the text is what the tokens add to the prompt's text; without, what they say alone. The two differ for
    SentencePiece vocabularies, which drop the space that a text begins with. Stop strings are never looked for in the prompt.

    One deviation: where byte tokens of a SentencePiece vocabulary turn out not to be valid UTF-8, `Tokenizer.decode` makes the
    whole run of them U+FFFD; here the characters that were complete before stay, and those complete long after are shown.
    """

    # tokenizers.decoders.DecodeStream decodes by the same window, but raises an error in the case just described and cannot give
    # out an incomplete character at the end.

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """`stop` holds no empty string. `spaces_between_special_tokens` = False drops a space that the vocabulary's decoder puts
        between two neighbouring special tokens."""
        assert all(stop), "a stop string must not be empty"
        self.text = ""
        """All that is settled: complete characters, before the stop string."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._skip_special = skip_special_tokens
        self._join_special = not spaces_between_special_tokens
        self._after_special = False
        self._sent = 0  # characters of `text` handed out
        self._done = False
        self._window = self._context(prompt_ids)  # the last tokens decoded to whole characters, then those since
        self._settled = len(self._window)  # how many of the window are the former
        self._prefix = self._decode(self._window)  # what of the window's text is in `text` or before it

    def push(self, token_id: int, *, check_stop: bool = True) -> StopMatch | None:
        """Append one token. The match, if its text completes a stop string; then `text` is cut and no token may follow.

        With `check_stop` = False a stop string that ends within this token does not count. A token that leaves a character
        incomplete adds nothing of it until the rest arrives.
        """
        assert not self._done, "push after the end"
        special = token_id in self._tokenizer.special_ids
        if special and self._skip_special:  # decodes to nothing; kept out so that a run of them does not grow the window
            return None
        new = self._advance(token_id)
        if special and self._after_special and self._join_special:
            new = new.removeprefix(" ")
        self._after_special = special
        before = len(self.text)
        self.text += new
        match = self._first_match(before) if check_stop and new else None
        if match is None:
            return None
        start, stop = match
        self.text = self.text[: start + len(stop) if self._include_stop else start]
        self._done = True
        return StopMatch(stop)

    def take_delta(self) -> str:
        """Text not handed out before, less a tail that may yet turn out to begin a stop string."""
        start, self._sent = self._sent, len(self.text) - self._held()
        return self.text[start : self._sent]

    def finish(self) -> None:
        """End the text: nothing is held back any more, and a character left incomplete becomes U+FFFD, as in `Tokenizer.decode`.

        That U+FFFD is not compared with stop strings. After a match there is none: the text ended there.
        """
        if not self._done:
            self._done = True
            self.text += self._decode(self._window)[len(self._prefix) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The fewest last tokens of the prompt that end in a whole character."""
        hidden = self._tokenizer.special_ids if self._skip_special else frozenset()
        visible = [i for i in prompt_ids if i not in hidden][-_CONTEXT_TOKENS:]
        tails = (visible[-n:] for n in range(1, len(visible) + 1))
        return next((tail for tail in tails if _REPLACEMENT not in self._decode(tail)), [])

    def _advance(self, token_id: int) -> str:
        """Append to the window; the complete characters that this adds to its text."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.startswith(self._prefix):  # a run of byte tokens does not go on as valid UTF-8: take the new ones alone
            self._window, self._settled, self._prefix = self._window[self._settled :], 0, ""
            text = self._decode(self._window)
        added = text[len(self._prefix) :]
        incomplete = min(len(added) - len(added.rstrip(_REPLACEMENT)), _INCOMPLETE)
        new = added[: len(added) - incomplete]
        self._prefix += new
        if not incomplete:  # the tokens before this addition are no longer needed to decode the next one
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._prefix = self._decode(self._window)
        elif len(self._window) >= _MOST_TOKENS:  # tokens that never end in a whole character: forget the first ones
            tail = text[len(self._prefix) :]
            self._window = self._window[-_KEPT_TOKENS:]
            text = self._decode(self._window)
            if not text.endswith(tail):  # byte tokens that were invalid only because of those forgotten
                new, tail = new + tail, ""
            self._prefix = text[: len(text) - len(tail)]
            self._settled = len(self._window) - len(tail)
        return new

    def _first_match(self, before: int) -> tuple[int, str] | None:
        """Start and string of the stop string that is complete first in `text`, of those that end after character `before`."""
        found = [(start, stop) for stop in self._stop if (start := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        return min(found, key=lambda match: (match[0] + len(match[1]), match[0]), default=None)

    def _held(self) -> int:
        """Length of the longest tail of `text` that is a proper prefix of a stop string."""
        if self._done or self._include_stop or not self._stop:
            return 0
        longest = min(len(self.text), max(map(len, self._stop)) - 1)
        tails = (self.text[-n:] for n in range(longest, 0, -1))
        return next((len(tail) for tail in tails if any(s != tail and s.startswith(tail) for s in self._stop)), 0)
