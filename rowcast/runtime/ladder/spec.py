"""What a ladder is made of, as users write it: rungs by kind, KV view and gamma, and the presets. Torch-free.

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

MOST_GAMMA = 64
MOST_LOWER_RUNGS = 4
SINKS, RECENT = 16, 64
"""First and last entries that a view always shows, where nothing else is said."""
STREAMING_STRIDE = 32
"""Entries that a draft's streaming cache drops at a time: so many fewer than `kv` may be shown."""

PRESETS = ("auto", "plain", "ngram", "triforce")
"""Ladders by name."""

_UNSET = -1
_DRAFT_KV = 256  # TriForce, arXiv 2404.11912, section 5.1.
_AUTO_KV = (256, 4096)
_AUTO_KV_SHARE = 8

_KEYS: dict[str, tuple[str, ...]] = {
    "ngram": ("gamma",),
    "draft": ("model", "kv", "sinks", "gamma"),
    "self": ("kv", "view", "score", "chunk", "sinks", "recent", "refresh", "gamma"),
    "plain": (),
}
_VIEW_KEYS = {
    "score": ("retrieval",),
    "chunk": ("retrieval",),
    "recent": ("retrieval", "eviction"),
    "refresh": ("retrieval", "eviction"),
}
_BOUNDS = {"kv": (1, 1 << 24), "chunk": (1, 1 << 10), "sinks": (0, 1 << 24), "recent": (1, 1 << 24), "refresh": (0, 1 << 24)}
_BOUNDS["gamma"] = (1, MOST_GAMMA)
_NAMES = {"view": get_args(View), "score": get_args(Score)}
_SEPARATOR = re.compile(r"(?:^|(?<=\s))/(?=\s|$)")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One way to run a model. Every mistake raises UserError."""

    kind: Kind
    """ngram: looks the context up. draft: another model. self: the model's own weights over a part of the KV. plain: all of both."""
    model: str | None = None
    """draft: a directory, GGUF file or hub id. None: the one that the caller of the ladder names."""
    kv: int | None = _UNSET
    """Entries that the KV view shows. None: all (draft, plain), or it has no KV (ngram). Left out: 256 for a draft; self needs it."""
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
        for item in re.split(r",(?=\s*[a-z]+\s*=)", rest) if colon else ():
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
            if self.kind == "self":
                raise UserError("a rung self needs kv, the KV entries that it sees; write for example self:kv=512")
            object.__setattr__(self, "kv", _DRAFT_KV if self.kind == "draft" else None)
        self._check_view()
        self._check_values()

    def __str__(self) -> str:
        """Canonical text: what differs from the defaults."""
        shown = []
        for key in _KEYS[self.kind]:
            value = getattr(self, key)
            default = {"kv": _DRAFT_KV if self.kind == "draft" else _UNSET, "view": "retrieval"}.get(key, _DEFAULTS[key])
            if value != default:
                shown.append(f"{key}={'full' if value is None else value}")
        return f"{self.kind}:{','.join(shown)}" if shown else self.kind

    @property
    def retrieves(self) -> bool:
        """Whether its view ranks chunks by summaries of their keys."""
        return self.view == "retrieval"

    @property
    def pays_from(self) -> int:
        """Committed tokens from which run-time control uses it, where gamma is not pinned."""
        return 2 * (self.kv or 0) if self.kind == "self" else 0

    def _check_view(self) -> None:
        if self.kind != "self":
            if self.view not in (None, "streaming" if self.kind == "draft" else None):
                raise UserError(f"view={self.view!r:.60} is not a setting of a rung {self.kind}; {_settings(self.kind)}")
            object.__setattr__(self, "view", "streaming" if self.kind == "draft" and self.kv is not None else None)
            return
        object.__setattr__(self, "view", self.view or "retrieval")
        for key, views in _VIEW_KEYS.items():
            if self.view in get_args(View) and self.view not in views and getattr(self, key) != _DEFAULTS[key]:
                raise UserError(
                    f"{key}={getattr(self, key)} is not a setting of the view {self.view}; leave it out, or use the view {views[0]}"
                )

    def _check_values(self) -> None:
        for key, (low, high) in _BOUNDS.items():
            value = getattr(self, key)
            if (value is None and (key, self.kind) != ("kv", "self")) or key not in _KEYS[self.kind]:
                continue
            if type(value) is not int or not low <= value <= high:
                raise UserError(
                    f"{key}={value!r:.60} of the rung {self.kind} is not a whole number from {low} to {high}; correct it"
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


_DEFAULTS = {key.name: key.default for key in fields(Rung)}


@dataclass(frozen=True)
class Ladder:
    """Rungs, cheapest first; each proposes to the next, the last one, plain, decides. Every mistake raises UserError."""

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
        if not kinds or kinds[-1] != "plain":
            raise UserError(
                f"the ladder {str(self)!r:.80} ends in {kinds[-1] if kinds else 'nothing'}; its last rung has to be plain"
            )
        if "plain" in kinds[:-1]:
            raise UserError(f"the ladder {str(self)!r:.80} has plain below its last rung; keep the last plain only")
        if "ngram" in kinds[1:]:
            raise UserError(
                f"the ladder {str(self)!r:.80} has ngram above its first rung; put one ngram first, nothing is cheaper"
            )
        if len(kinds) - 1 > MOST_LOWER_RUNGS:
            raise UserError(
                f"the ladder {str(self)!r:.80} has {len(kinds) - 1} rungs below plain; use at most {MOST_LOWER_RUNGS}"
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

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The statistics' key of each rung: its kind or, where another rung is of that kind, its text without gamma."""
        kinds = [rung.kind for rung in self.rungs]
        return tuple(rung.kind if kinds.count(rung.kind) == 1 else str(replace(rung, gamma=None)) for rung in self.rungs)


def resolve(
    ladder: str | Ladder,
    *,
    draft: str | None,
    kv_budget: int | None,
    max_context: int,
    kv_bytes_per_token: int,
    pass_bytes: int,
) -> tuple[Ladder, bool, list[str]]:
    """The ladder that a preset's name, a text or a Ladder means, whether it is `auto`, and the reasons for automatic choices.

    `draft`: a model for the rungs draft that name none, or "ngram" for an n-gram rung in their place. `kv_budget`: KV entries of the
    rung self of `triforce` and `auto`. `pass_bytes`: weights that a pass of the last rung reads. Under `auto` any rung may be left out
    at run time; the ladder is all that there is. Raises UserError where `draft` or `kv_budget` has no place.
    """
    reasons: list[str] = []
    if ladder == "auto":
        found = _auto_ladder(draft, kv_budget, max_context, kv_bytes_per_token, pass_bytes, reasons)
        return found, True, reasons
    if ladder == "triforce":
        kv = kv_budget if kv_budget is not None else _kv_for(max_context)
        if kv_budget is None:
            reasons.append(
                f"rung self:kv={kv}: an eighth of {max_context} tokens of context, within {_AUTO_KV[0]} and {_AUTO_KV[1]}"
            )
        found = Ladder((Rung(kind="draft"), Rung(kind="self", kv=kv), Rung(kind="plain")))
    elif kv_budget is not None:
        raise UserError(
            f"kv_budget={kv_budget} has no place in the ladder {str(ladder)!r:.80}; leave it out, write self:kv=... in the ladder, or "
            "use auto or triforce"
        )
    elif isinstance(ladder, Ladder):
        found = ladder
    else:
        found = Ladder.parse("ngram / plain" if ladder.strip() == "ngram" else ladder)
    return _with_draft(found, draft), False, reasons


def _with_draft(ladder: Ladder, draft: str | None) -> Ladder:
    """Fill the rungs draft that name no model."""
    empty = [i for i, rung in enumerate(ladder.rungs) if rung.kind == "draft" and rung.model is None]
    if draft is None:
        if empty:
            raise UserError(
                f"the ladder {str(ladder)!r:.80} has a rung draft without a model; give draft=MODEL, or write draft:model=MODEL in it"
            )
        return ladder
    if draft == "ngram":
        if empty == [0]:
            return Ladder((Rung(kind="ngram"), *ladder.rungs[1:]))
        if ladder.rungs[0].kind == "ngram" and not empty:
            return ladder
    elif empty:
        return Ladder(tuple(replace(rung, model=draft) if i in empty else rung for i, rung in enumerate(ladder.rungs)))
    fix = "ngram" if draft == "ngram" else "triforce"
    raise UserError(
        f"draft={draft!r:.80} has no place in the ladder {str(ladder)!r:.80}; leave it out, or use the ladder auto or {fix}"
    )


def _auto_ladder(
    draft: str | None, kv_budget: int | None, max_context: int, kv_bytes_per_token: int, pass_bytes: int, reasons: list[str]
) -> Ladder:
    rungs = [Rung(kind="ngram")]
    reasons.append("rung ngram: it costs next to nothing")
    if draft is None or draft == "ngram":
        reasons.append("no rung draft: no draft model was given")
    else:
        rungs.append(Rung(kind="draft", model=draft))
        reasons.append("rung draft: a draft model was given")
    share = max_context * kv_bytes_per_token / max(pass_bytes, 1)
    told = f"KV of {max_context} tokens is {share:.2f} of the weights that a pass reads"
    if kv_budget is not None:
        rungs.append(Rung(kind="self", kv=kv_budget))
        reasons.append(f"rung self:kv={kv_budget}: a KV budget was given")
    elif share >= 0.5 and max_context >= 2 * _AUTO_KV[0]:
        rungs.append(Rung(kind="self", kv=_kv_for(max_context)))
        reasons.append(f"rung {rungs[-1]}: {told}")
    else:
        reasons.append(f"no rung self: {told}")
    return Ladder((*rungs, Rung(kind="plain")))


def _kv_for(max_context: int) -> int:
    """An eighth of the context in whole 64s, within `_AUTO_KV`."""
    low, high = _AUTO_KV
    return min(max(max_context // _AUTO_KV_SHARE // 64 * 64, low), high)


def _check_kind(kind: str) -> None:
    if kind not in _KEYS:
        stand = f"; {kind} is a whole ladder and stands alone" if kind in PRESETS else ""
        raise UserError(
            f"unknown rung {kind!r:.60}{stand}; the rungs are {', '.join(_KEYS)}, the ladders by name {', '.join(PRESETS)}"
        )


def _settings(kind: str) -> str:
    return f"its settings are {', '.join(_KEYS[kind])}" if _KEYS[kind] else "it has none"


def _value(key: str, text: str) -> int | str | None:
    """A number where the key has bounds, else the text; what is out of bounds is refused later."""
    if key == "kv" and text == "full":
        return None
    if key in _BOUNDS and re.fullmatch(r"\d{1,9}", text):
        return int(text)
    return text


def _unwritable(model: str) -> bool:
    """Whether `Ladder.parse` would read the text back differently."""
    return (
        model != model.strip()
        or len(model.splitlines()) != 1
        or bool(re.search(r",\s*[a-z]+\s*=", model) or _SEPARATOR.search(model))
    )
