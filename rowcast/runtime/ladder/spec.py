"""What a ladder is made of, as users write it: rungs by kind, KV view, sparsity, bits and gamma. Torch-free.

It does not know how a rung runs, nor whether its model exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from rowcast.errors import UserError

Kind = Literal["ngram", "draft", "self", "plain"]
View = Literal["retrieval", "streaming", "eviction"]
Score = Literal["mean", "bounds"]
"""A chunk's mean key (TriForce, arXiv 2404.11912, section 4.1), or its smallest and largest one by channel (Quest, arXiv 2406.10774,
section 3.2)."""
ScorerName = Literal[
    "q2", "q3", "q4", "q8", "lowrank", "dejavu", "gate", "oracle",
    "q2-ahead", "q3-ahead", "q4-ahead", "q8-ahead", "lowrank-ahead", "dejavu-ahead",
]  # fmt: skip
"""How a rung predicts which neurons matter (`sparse.build`); -ahead: from the attention's input instead of the MLP's."""
HeadReads = Literal["own", "ahead"]
"""What heads are chosen by. own: the attention's input. ahead: the MLP's input of the layer before, so that the choice is made while
that MLP runs (Deja Vu, arXiv 2310.17157, section 4.3)."""
Cut = Literal["top", "threshold"]
"""Each token's best neurons, as many for every token; or those that score above a calibrated threshold, as many on average."""
Head = Literal["full", "hire"]
"""All rows of the LM head; or a few bits of them and exact rows for the likeliest tokens (`sparse.lm_head`)."""
Bits = Literal[4, 8]
"""All weights, rounded to so many bits when the model is loaded (`lowbit_weights`)."""
Place = Literal["ranks", "first", "driver"]
"""Of several ranks: every one runs the draft; rank 0 does and tells the others; the driver does, on a device outside the gang."""

MOST_GAMMA = 64
MOST_LOWER_RUNGS = 4
SINKS, RECENT = 16, 64
"""First and last entries that a view always shows, where nothing else is said."""
STREAMING_STRIDE = 32
"""Entries that a draft's streaming cache drops at a time: so many fewer than `kv` may be shown."""

PRESETS = ("auto", "plain", "ngram", "triforce", "dejavu", "hire")
"""Ladders by name."""

_UNSET = -1
_DRAFT_KV = 256  # TriForce, arXiv 2404.11912, section 5.1.

_NEURON_KEYS = ("by", "over", "cut", "common", "group")
"""How neurons are chosen, where `mlp` says how many."""
_WEIGHT_KEYS = ("mlp", *_NEURON_KEYS, "heads", "heads_by", "lm", "bits")
"""Of a rung self: what it reads of the weights."""
_KEYS: dict[str, tuple[str, ...]] = {
    "ngram": ("gamma",),
    "draft": ("model", "kv", "sinks", "at", "gamma"),
    "self": (
        *_WEIGHT_KEYS,
        *("kv", "view", "score", "chunk", "sinks", "recent", "refresh", "gamma"),
    ),
    "plain": (),
}
_VIEW_KEYS = {
    "score": ("retrieval",),
    "chunk": ("retrieval",),
    "recent": ("retrieval", "eviction"),
    "refresh": ("retrieval", "eviction"),
}
_BOUNDS = {"kv": (1, 1 << 24), "chunk": (1, 1 << 10), "sinks": (0, 1 << 24), "recent": (1, 1 << 24), "refresh": (0, 1 << 24)}
_BOUNDS |= {"gamma": (1, MOST_GAMMA), "group": (1, 64)}
_SHARES = {"mlp": (0.0, 1.0), "common": (0.0, 1.0), "heads": (0.0, 1.0), "over": (1.0, 8.0)}
"""Bounds of numbers that need not be whole; 0 itself is not allowed."""
_CHOICES = {"bits": get_args(Bits)}
"""Numbers of which one is chosen."""
_NAMES = {
    "view": get_args(View),
    "score": get_args(Score),
    "by": get_args(ScorerName),
    "cut": get_args(Cut),
    "heads_by": get_args(HeadReads),
    "lm": get_args(Head),
    "at": get_args(Place),
}
_SEPARATOR = re.compile(r"(?:^|(?<=\s))/(?=\s|$)")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run a model. Every mistake raises UserError."""

    kind: Kind
    """ngram: looks the context up. draft: another model. self: the model's own weights, a part of them or of the KV. plain: all of
    both."""
    mlp: float | None = None
    """self: share of the neurons that a token uses, on average over layers. None: all."""
    by: ScorerName | None = None
    """self: what finds those neurons. None: chosen when the ladder is resolved."""
    over: float = 1.0
    """self: so many times more neurons are found first, computed exactly and ranked again (HiRE)."""
    cut: Cut = "top"
    """self: top: each token uses as many neurons. threshold: those that score above a calibrated threshold, on average `mlp`."""
    common: float | None = None
    """self: share of the neurons, within `mlp`, that every token uses: the most frequent ones of a calibration. None: none."""
    group: int = 1
    """self: so many neighbouring neurons are chosen together, and their number is rounded to whole groups."""
    heads: float | None = None
    """self: share of the query heads that a token uses, on average over layers. None: all."""
    heads_by: HeadReads = "own"
    """self: what these are chosen by; layer 0, which has none before it, by its own input."""
    lm: Head = "full"
    """self: full: all rows of the LM head. hire: a few bits of them, and the rows that may be among the largest exactly."""
    bits: Bits | None = None
    """self: all weights, in so many bits each. None: in the model's own format."""
    model: str | None = None
    """draft: a directory, GGUF file or hub id. None: the one that the caller of the ladder names."""
    at: Place = "ranks"
    """draft: where it runs, where there are several ranks."""
    kv: int | None = _UNSET
    """Entries that the KV view shows. None: all, or it has no KV (ngram). Left out: 256 for a draft, all for a self that is sparse or
    has `bits`; any other self needs it."""
    view: View | None = None
    """self: which entries. Left out: retrieval. A draft with `kv` is streaming. None: all of them, or no KV."""
    score: Score = "bounds"
    """retrieval: what chunks are ranked by."""
    chunk: int = 8
    """retrieval: entries in a chunk."""
    sinks: int = SINKS
    """First entries, always shown."""
    recent: int = RECENT
    """retrieval, eviction: last entries, always shown. A streaming view shows all that `kv` leaves beside the sinks."""
    refresh: int = 1
    """retrieval, eviction: entries are chosen anew every so many rounds. 0: once."""
    gamma: int | None = None
    """Tokens that the next rung asks of this one at a time, pinned. None: chosen at run time."""

    @classmethod
    def parse(cls, text: str) -> Rung:
        """Such as "self:kv=512,gamma=4". "full" is another name for "plain"."""
        kind, colon, rest = text.strip().partition(":")
        kind = {"full": "plain"}.get(kind.strip(), kind.strip())
        _check_kind(kind)
        given: dict[str, Any] = {}
        for item in re.split(r",(?=\s*[a-z_]+\s*=)", rest) if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if key not in _KEYS[kind]:
                raise UserError(
                    f"{key or item!r:.60} in {text.strip()!r:.80} is not a setting of a rung {kind}; {_settings(kind)}"
                )
            if not equals or not value or key in given:
                wrong = "stands twice" if key in given else "has no value"
                raise UserError(f"{key} {wrong} in the rung {text.strip()!r:.80}; write it once, as in {kind}:{key}=...")
            given[key] = _value(key, value)
        return cls(kind=kind, **given)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        for key in fields(self):
            if key.name in _KEYS[self.kind] or key.name in ("kind", "view") or getattr(self, key.name) in (key.default, None):
                continue
            raise UserError(
                f"{key.name}={getattr(self, key.name)!r:.60} is not a setting of a rung {self.kind}; {_settings(self.kind)}"
            )
        if self.kv == _UNSET:
            if self.kind == "self" and not self.light:
                raise UserError(
                    "a rung self needs kv, the KV entries that it sees, or mlp, heads, lm=hire or bits, what it reads of the weights; "
                    "write for example self:kv=512, self:mlp=0.5 or self:bits=4"
                )
            object.__setattr__(self, "kv", _DRAFT_KV if self.kind == "draft" else None)
        self._check_view()
        self._check_values()
        self._check_sparsity()

    def __str__(self) -> str:
        """Canonical text: what differs from the defaults."""
        shown = []
        for key in _KEYS[self.kind]:
            value = getattr(self, key)
            default = {"kv": self._default_kv, "view": None if self.kv is None else "retrieval"}.get(key, _DEFAULTS[key])
            if value != default:
                shown.append(f"{key}={'full' if value is None else _number(value) if isinstance(value, float) else value}")
        return f"{self.kind}:{','.join(shown)}" if shown else self.kind

    @property
    def sparse(self) -> bool:
        """Whether it reads chosen weights only."""
        return self.mlp is not None or self.heads is not None or self.lm == "hire"

    @property
    def light(self) -> bool:
        """Whether it reads less of the weights than plain does: chosen ones only, or a few bits of each."""
        return self.sparse or self.bits is not None

    @property
    def over_all_kv(self) -> Rung:
        """A rung self that reads the same of the weights and all of the KV: a calibration's quality is by these."""
        return Rung(kind="self", **{key: getattr(self, key) for key in _WEIGHT_KEYS})

    @cached_property
    def weights(self) -> Rung | None:
        """The settings that say what it reads of the model's weights: rungs that are equal in them share one view. None: what plain
        reads.

        A rung that skips heads knows which entries of its own KV view lack them, so that it shares nothing with other views.
        """
        if self.bits is not None:
            return Rung(kind="self", bits=self.bits)
        if not self.sparse or self.heads is not None:
            return replace(self, gamma=None) if self.sparse else None
        chosen: dict[str, Any] = {key: getattr(self, key) for key in (*_NEURON_KEYS, "lm")}
        return Rung(kind="self", mlp=self.mlp, **chosen)

    @property
    def retrieves(self) -> bool:
        """Whether its view ranks chunks by summaries of their keys."""
        return self.view == "retrieval"

    @property
    def pays_from(self) -> int:
        """Committed tokens from which run-time control uses it, where gamma is not pinned."""
        return 2 * (self.kv or 0) if self.kind == "self" and not self.light else 0

    @property
    def _default_kv(self) -> int | None:
        return _DRAFT_KV if self.kind == "draft" else None if self.light else _UNSET

    def _check_view(self) -> None:
        if self.kind != "self":
            if self.view not in (None, "streaming" if self.kind == "draft" else None):
                raise UserError(f"view={self.view!r:.60} is not a setting of a rung {self.kind}; {_settings(self.kind)}")
            object.__setattr__(self, "view", "streaming" if self.kind == "draft" and self.kv is not None else None)
            return
        if self.kv is None and self.light:
            idle = [key for key in ("view", *_VIEW_KEYS, "sinks") if getattr(self, key) != _DEFAULTS[key]]
            if idle:
                raise UserError(
                    f"{idle[0]}={getattr(self, idle[0])!r:.60} is for a rung self that sees a part of the KV; add kv=..."
                )
            return
        object.__setattr__(self, "view", self.view or "retrieval")
        for key, views in _VIEW_KEYS.items():
            if self.view in get_args(View) and self.view not in views and getattr(self, key) != _DEFAULTS[key]:
                raise UserError(
                    f"{key}={getattr(self, key)} is not a setting of the view {self.view}; leave it out, or use the view {views[0]}"
                )

    def _check_values(self) -> None:
        for key, (least, most) in _BOUNDS.items():
            value = getattr(self, key)
            if (value is None and ((key, self.kind) != ("kv", "self") or self.light)) or key not in _KEYS[self.kind]:
                continue
            if type(value) is not int or not least <= value <= most:
                raise UserError(
                    f"{key}={value!r:.60} of the rung {self.kind} is not a whole number from {least} to {most}; correct it"
                )
        for key, (low, high) in _SHARES.items():
            value = getattr(self, key)
            if value is None:
                continue
            if type(value) not in (int, float) or not low <= value <= high or not value:
                bounds = f"from {low:g} to {high:g}" if low else f"above 0 and up to {high:g}"
                raise UserError(f"{key}={value!r:.60} of the rung {self.kind} is not a number {bounds}; correct it")
            object.__setattr__(self, key, float(value))
        for key, numbers in _CHOICES.items():
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value not in numbers):
                raise UserError(
                    f"{key}={value!r:.60} of the rung {self.kind} is not one of {', '.join(map(str, numbers))}; choose one"
                )
        for key, names in _NAMES.items():
            value = getattr(self, key)
            if value is not None and value not in names:
                raise UserError(f"{key}={value!r:.60} of the rung {self.kind} is not one of {', '.join(names)}; choose one")
        if self.model is not None and (not isinstance(self.model, str) or not self.model or _unwritable(self.model)):
            raise UserError(
                f"model={self.model!r:.80} cannot stand in a ladder's text; give a path without ' / ', ',word=' or outer spaces"
            )
        if self.kv is None:
            return
        if self.kind == "draft":
            parts = {"sinks": self.sinks, "the stride of eviction": STREAMING_STRIDE, "one more": 1}
        elif self.view == "streaming":
            parts = {"sinks": self.sinks, "two more": 2}
        elif self.view == "eviction":
            parts = {"sinks": self.sinks, "recent": self.recent, "one more": 1}
        else:
            sinks = -(-self.sinks // self.chunk) * self.chunk
            parts = {"sinks in whole chunks": sinks, "recent": self.recent, "a chunk wherever it starts": 2 * self.chunk - 1}
        if self.kv < sum(parts.values()):
            needs = " + ".join(f"{name} ({count})" for name, count in parts.items())
            raise UserError(
                f"kv={self.kv} of the rung {self.kind} is less than {needs} = {sum(parts.values())}; raise kv to that or more"
            )

    def _check_sparsity(self) -> None:
        chosen = [key for key in ("mlp", "heads", "lm") if getattr(self, key) != _DEFAULTS[key]]
        if self.bits is not None and chosen:
            raise UserError(
                f"{chosen[0]}={getattr(self, chosen[0])} and bits={self.bits} of the rung {self.kind} cannot be had together, as bits "
                "rounds all weights; leave one out"
            )
        for key in _NEURON_KEYS:
            if self.mlp is None and getattr(self, key) != _DEFAULTS[key]:
                raise UserError(f"{key}={getattr(self, key)} chooses neurons, and the rung {self.kind} uses all; add mlp=0.5")
        if self.heads is None and self.heads_by != "own":
            raise UserError(f"heads_by={self.heads_by} chooses heads, and the rung {self.kind} uses all; add heads=0.5")
        given = [key for key in ("cut", "group", "over", "common") if getattr(self, key) != _DEFAULTS[key]]
        if len(given) > 1 and given != ["over", "common"]:
            first, second = (f"{key}={getattr(self, key)}" for key in given[:2])
            raise UserError(f"{first} and {second} of the rung {self.kind} cannot be had together; leave one out")
        if self.mlp is not None and self.common is not None and self.common > self.mlp:
            raise UserError(
                f"common={self.common} of the rung {self.kind} is more than mlp={self.mlp}; lower common to that or less"
            )


_DEFAULTS = {key.name: key.default for key in fields(Rung)}


@dataclass(frozen=True)
class Ladder:
    """Rungs, cheapest first; each proposes to the next, the last one decides: plain, or a self over all of the KV that is sparse or has
    bits. Every mistake raises UserError."""

    rungs: tuple[Rung, ...]

    @classmethod
    def parse(cls, text: str) -> Ladder:
        """Such as "ngram / self:kv=512,gamma=4 / full". Where a model is named, a slash that separates rungs stands between spaces."""
        parts = _SEPARATOR.split(text.strip()) if "model" in text else text.split("/")
        if not all(part.strip() for part in parts):
            raise UserError(
                f"the ladder {text!r:.80} has an empty rung; write rungs with one slash between them, as in ngram / plain"
            )
        return cls(tuple(map(Rung.parse, parts)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "rungs", tuple(self.rungs))
        kinds = [rung.kind for rung in self.rungs]
        if not kinds or (kinds[-1] != "plain" and not self.approximate):
            raise UserError(
                f"the ladder {str(self)!r:.80} ends in {kinds[-1] if kinds else 'nothing'}; its last rung has to be plain, or with "
                "kv=full a self that has mlp, heads, lm=hire or bits"
            )
        if self.rungs[-1].gamma is not None:
            raise UserError(
                f"gamma={self.rungs[-1].gamma} is for rungs that draft, and {self.rungs[-1]} is the last; leave it out"
            )
        if "plain" in kinds[:-1]:
            raise UserError(f"the ladder {str(self)!r:.80} has plain below its last rung; keep the last plain only")
        if "ngram" in kinds[1:]:
            raise UserError(
                f"the ladder {str(self)!r:.80} has ngram above its first rung; put one ngram first, nothing is cheaper"
            )
        if len(kinds) - 1 > MOST_LOWER_RUNGS:
            raise UserError(
                f"the ladder {str(self)!r:.80} has {len(kinds) - 1} rungs below the last; use at most {MOST_LOWER_RUNGS}"
            )
        for i, rung in enumerate(self.rungs):
            if rung.at != "ranks" and set(kinds[:i]) - {"ngram"}:
                raise UserError(
                    f"the rung {str(rung)!r:.80} stands above {self.rungs[i - 1].kind}, and only ngram may be below a draft with "
                    f"at={rung.at}; put it first, or use at=ranks"
                )
        twins = [name for i, name in enumerate(self.names) if name in self.names[:i]]
        if twins:
            raise UserError(f"the ladder {str(self)!r:.80} has the rung {twins[0]} twice; leave one out")

    def __str__(self) -> str:
        """Canonical text; `parse` gives the same ladder back."""
        return " / ".join(map(str, self.rungs))

    @property
    def lower(self) -> tuple[Rung, ...]:
        """All rungs but the last."""
        return self.rungs[:-1]

    @property
    def approximate(self) -> bool:
        """Whether the last rung is not the whole model, so that the output's law is not the model's."""
        last = self.rungs[-1]
        return last.kind == "self" and last.light and last.kv is None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The statistics' key of each rung: its kind or, where another rung is of that kind, its text without gamma."""
        kinds = [rung.kind for rung in self.rungs]
        return tuple(rung.kind if kinds.count(rung.kind) == 1 else str(replace(rung, gamma=None)) for rung in self.rungs)


def _check_kind(kind: str) -> None:
    if kind not in _KEYS:
        stand = f"; {kind} is a whole ladder and stands alone" if kind in PRESETS else ""
        raise UserError(
            f"unknown rung {kind!r:.60}{stand}; the rungs are {', '.join(_KEYS)}, the ladders by name {', '.join(PRESETS)}"
        )


def _settings(kind: str) -> str:
    return f"its settings are {', '.join(_KEYS[kind])}" if _KEYS[kind] else "it has none"


def _value(key: str, text: str) -> int | float | str | None:
    """A number where the key has bounds, else the text; what is out of bounds is refused later."""
    if key == "kv" and text == "full":
        return None
    if key in _SHARES and re.fullmatch(r"\d{0,9}\.?\d{1,18}(e-?\d{1,2})?", text):
        return float(text)
    if (key in _BOUNDS or key in _CHOICES) and re.fullmatch(r"\d{1,9}", text):
        return int(text)
    return text


def _number(value: float) -> str:
    """The shortest text that gives the number back."""
    return repr(value).removesuffix(".0")


def _unwritable(model: str) -> bool:
    """Whether `Ladder.parse` would read the text back differently."""
    return (
        model != model.strip()
        or len(model.splitlines()) != 1
        or bool(re.search(r",\s*[a-z_]+\s*=", model) or _SEPARATOR.search(model))
    )
