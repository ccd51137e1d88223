"""What one request may ask of an engine's ladder: some of its rungs, or another last rung that is there anyway. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rowcast.errors import UserError
from rowcast.runtime.ladder.spec import Ladder, Rung

_PLAIN = Rung(kind="plain")


@dataclass(frozen=True, slots=True)
class Last:
    """A rung that can decide, over all of the KV."""

    rung: Rung
    name: str
    """Its key in statistics."""
    below: int
    """So many rungs of the ladder, the cheapest ones, may draft for it."""

    @property
    def approximate(self) -> bool:
        """Whether its law is not the model's."""
        return self.rung.kind != "plain"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a request was given."""

    ladder: Ladder
    """The rungs that may run for it."""
    names: tuple[str, ...]
    """Their keys in statistics, which are those of the engine's ladder."""
    drafters: list[str] | None = None
    """Names of those that may draft; None: all below the last one."""
    last: str | None = None
    """Name of the one that decides, where that is not the engine's last rung."""


class Choices:
    """Of one ladder."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        last = ladder.rungs[-1]
        self._default = Last(last, ladder.names[-1], len(ladder.lower))

    @cached_property
    def others(self) -> tuple[Last, ...]:
        """Rungs that can decide beside the last one, at no memory of their own, cheapest first.

        Those that read a part of the weights and all of the KV; under a last rung that is no plain one, plain where its weights are
        there: a sparse rung chooses among all rows, a rung self that leaves out KV only has all weights.
        """
        rungs, names = self._ladder.rungs, self._ladder.names
        found = [
            Last(replace(rung, gamma=None), names[place], place)
            for place, rung in enumerate(rungs[:-1])
            if rung.kind == "self" and rung.light and rung.kv is None
        ]
        whole = any(rung.kind == "self" and (rung.weights is None or rung.sparse) for rung in rungs)
        if self._default.approximate and whole:
            found.append(Last(_PLAIN, _PLAIN.kind, len(rungs) - 1))
        return tuple(found)

    @property
    def mode(self) -> str:
        """Of requests that name none."""
        return _mode(self._default)

    @property
    def modes(self) -> list[str]:
        """That requests can have."""
        return list(dict.fromkeys(map(_mode, (self._default, *reversed(self.others)))))

    def choose(self, text: str | None = None, mode: str | None = None) -> Chosen:
        """`text`: some of the ladder's rungs, in order, by name or as the ladder writes them, with or without gamma; the last one
        decides. None: all below the mode's last rung. `mode`: None: `self.mode`. Raises UserError for what is not to be had."""
        lasts = self._lasts(mode)
        if text is None:
            return self._chosen(lasts[0], None)
        parts = [part.strip() for part in text.split(" / ")] if "model" in text else [part.strip() for part in text.split("/")]
        last = next((last for last in lasts if _is(last.rung, last.name, parts[-1])), None)
        if last is None:
            ends = " or ".join(dict.fromkeys(last.name for last in lasts))
            raise UserError(f"the ladder {text!r:.80} does not end in {ends}; {self._has}")
        drafters: list[int] = []
        for part in parts[:-1]:
            behind = drafters[-1] + 1 if drafters else 0
            place = next((place for place in range(behind, last.below) if self._is(place, part)), None)
            if place is None:
                raise UserError(f"{part!r:.60} in the ladder {text!r:.80} is none of the rungs in its place; {self._has}")
            drafters.append(place)
        return self._chosen(last, drafters)

    def _lasts(self, mode: str | None) -> Sequence[Last]:
        """The rungs that may decide in this mode, the one that does where nothing else is said first."""
        mode = self.mode if mode is None else mode
        if mode not in ("exact", "approximate"):
            raise UserError(f"mode={mode!r:.40} is not known; choose exact or approximate")
        found = [last for last in (self._default, *reversed(self.others)) if _mode(last) == mode]
        if not found:
            lacks = "a sparse or low-bit rung that sees all of the KV" if mode == "approximate" else "all of the model's weights"
            raise UserError(f"mode={mode} takes {lacks}; {self._has}")
        return found

    def _chosen(self, last: Last, drafters: Sequence[int] | None) -> Chosen:
        used = range(last.below) if drafters is None else drafters
        rungs, names = self._ladder.rungs, self._ladder.names
        return Chosen(
            Ladder((*(rungs[place] for place in used), last.rung)),
            (*(names[place] for place in used), last.name),
            None if drafters is None else [names[place] for place in used],
            None if last is self._default else last.name,
        )

    def _is(self, place: int, text: str) -> bool:
        return _is(self._ladder.rungs[place], self._ladder.names[place], text)

    @property
    def _has(self) -> str:
        """What there is, for who asked for something else."""
        modes = self.modes
        kinds = f"mode {modes[0]}" if len(modes) == 1 else f"modes {' and '.join(modes)}"
        return f"this server's ladder is {self._ladder}, {kinds}: give rungs of it, in order, or leave it out"


def _mode(last: Last) -> str:
    return "approximate" if last.approximate else "exact"


def _is(rung: Rung, name: str, text: str) -> bool:
    """Whether a request means this rung."""
    if rung.kind == "plain":
        return text in ("plain", "full")
    return text in (name, str(rung), str(replace(rung, gamma=None)))
