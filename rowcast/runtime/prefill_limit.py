"""How many tokens of prompts a step may run, so that those who decode do not wait long for it. Torch-free."""

from __future__ import annotations

import math

from rowcast.errors import UserError

LEAST_TOKENS = 32
"""A prefill goes on, however slow."""
_FIRST_TOKENS = 64
"""Before any prefill was timed."""
_ALONE = 4
"""Where nobody decodes, only newcomers wait for a step's end: it may take so many times longer."""
_KEEP = 0.7
"""Of what earlier steps told, with each new one."""


class PrefillLimit:
    """A number that was asked for, or one that follows from how fast prompts were run lately."""

    def __init__(self, most_tokens: int | None, stall_s: float | None) -> None:
        """`most_tokens`: of prompts in a step in which others decode. `stall_s`: by how many seconds prompts may prolong such a step;
        then steps without decoding are bounded, too. With both, the smaller number counts."""
        self._most = most_tokens
        self._stall_s = stall_s
        self._seconds = self._tokens = 0.0
        self._decoding_s: float | None = None
        """A step without prompts."""

    def tokens(self, decoding: int) -> int | None:
        """Most tokens of prompts in a step with so many decoding sequences; None: any number."""
        limits = [] if self._most is None or not decoding else [self._most]
        if self._stall_s is not None:
            target = self._stall_s if decoding else _ALONE * self._stall_s
            if self._tokens:
                limits.append(max(LEAST_TOKENS, int(target * self._tokens / max(self._seconds, 1e-9))))
            else:
                limits.append(_FIRST_TOKENS if decoding else _ALONE * _FIRST_TOKENS)
        return min(limits, default=None)

    def observe(self, seconds: float, prompt_tokens: int, decoding: int) -> None:
        """What a step took."""
        if not prompt_tokens:
            if decoding:
                before = seconds if self._decoding_s is None else self._decoding_s
                self._decoding_s = _KEEP * before + (1 - _KEEP) * seconds
            return
        if decoding and self._decoding_s is not None:
            seconds = max(0.0, seconds - self._decoding_s)
        self._seconds = _KEEP * self._seconds + seconds
        self._tokens = _KEEP * self._tokens + prompt_tokens


def prefill_limit(max_num_prefill_tokens: int | None, prefill_stall_s: float | None) -> PrefillLimit | None:
    """What a caller asked for; None: nothing. Raises UserError."""
    if max_num_prefill_tokens is None and prefill_stall_s is None:
        return None
    tokens, stall = max_num_prefill_tokens, prefill_stall_s
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise UserError(f"max_num_prefill_tokens={tokens!r:.60} has to be a whole number from 1 on, or None")
    if stall is not None and (not isinstance(stall, (int, float)) or isinstance(stall, bool) or not 0 < stall < math.inf):
        raise UserError(f"prefill_stall_s={stall!r:.60} has to be a number of seconds above 0, or None")
    return PrefillLimit(tokens, stall)
