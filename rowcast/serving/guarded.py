"""Detokenizers whose errors stay with their request: a text that cannot be made is no reason to end the others. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from rowcast.errors import UserError
from rowcast.runtime import request as requests
from rowcast.runtime.detokenizer import Detokenizer, StopMatch
from rowcast.runtime.engine import MakeDetokenizer
from rowcast.runtime.params import SamplingParams

T = TypeVar("T")


class Guarded:
    """A `Detokenizer` that raises nothing: after an `error` it adds no text, and whoever made it looks."""

    def __init__(self, make: Callable[[], Detokenizer]) -> None:
        """Raises UserError as `make` does, and nothing else."""
        self.error: Exception | None = None
        self._inner: Detokenizer | None = None
        try:
            self._inner = make()
        except UserError:
            raise
        except Exception as error:
            self.error = error

    @property
    def text(self) -> str:
        return "" if self._inner is None else self._inner.text

    def push(self, token_id: int, *, check_stop: bool = True) -> StopMatch | None:
        return self._try(lambda inner: inner.push(token_id, check_stop=check_stop), None)

    def take_delta(self) -> str:
        return self._try(Detokenizer.take_delta, "")

    def finish(self) -> None:
        self._try(Detokenizer.finish, None)

    def _try(self, do: Callable[[Detokenizer], T], otherwise: T) -> T:
        if self.error is None and self._inner is not None:
            try:
                return do(self._inner)
            except Exception as error:
                self.error = error
        return otherwise


def guard(make: MakeDetokenizer | None) -> MakeDetokenizer | None:
    """Likewise, guarded."""
    if make is None:
        return None

    def guarded(params: SamplingParams, prompt_ids: Sequence[int]) -> Detokenizer:
        return cast(Detokenizer, Guarded(lambda: make(params, prompt_ids)))

    return guarded


def text_error(seq: requests.Sequence) -> Exception | None:
    """What went wrong with a sequence's text."""
    detokenizer = cast(object, seq.detokenizer)
    return detokenizer.error if isinstance(detokenizer, Guarded) else None
