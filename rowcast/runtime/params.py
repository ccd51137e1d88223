"""What a request asks of sampling: vLLM's names, defaults and bounds. Torch-free.

It does not know tokenizers (`bad_words` and `stop` stay text) or the model: the sampler checks ids against the vocabulary.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, cast

from rowcast.errors import UserError

GREEDY_BELOW = 1e-5
"""Temperatures below it mean greedy, as in vLLM."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Every mistake, an unknown keyword included, raises UserError.

    Sequences become tuples and a lone `stop` string a tuple of one, so an instance never changes. Numbers become plain ints
    and floats.
    """

    n: int = 1
    """Completions a prompt."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated. -2..2."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated. -2..2."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or generated (Keskar et al., arXiv 1909.05858)."""
    temperature: float = 1.0
    """0 (or below 1e-5): greedy."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities reach this sum (Holtzman et al., arXiv 1904.09751)."""
    top_k: int = 0
    """Draw from this many most likely tokens. 0 or -1: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest (Nguyen et al., arXiv 2407.01082)."""
    seed: int | None = None
    """None: one derived from the seed of `LLM` and the request's number. Reported in the statistics."""
    stop: str | Sequence[str] | None = None
    """Text that ends the output."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the output, beside the model's own."""
    bad_words: Sequence[str] | None = None
    """Words never generated: the last token of each is forbidden where the ones before it were just generated."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Generate past the end-of-sequence token."""
    max_tokens: int | None = 16
    """None: up to the model's context."""
    min_tokens: int = 0
    """Before so many tokens are generated, end-of-sequence and `stop_token_ids` are forbidden."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of so many most likely ones. 0..20, -1: the whole vocabulary."""
    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    """Keep so many last tokens of the prompt. -1: as many as the model's context holds."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits, by token id."""
    allowed_token_ids: Sequence[int] | None = None
    """Generate these only."""

    def __new__(cls, **given: object) -> SamplingParams:
        """Refuse unknown keywords before the dataclass's `__init__` sees them."""
        _check_names(given)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SamplingParams:
        """From parsed JSON or msgpack: as the constructor, with `logit_bias` keys also as decimal strings."""
        _check_names(given)
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping):
            given = {**given, "logit_bias": {_id_from_json(key): value for key, value in bias.items()}}
        return cls(**given)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty where there is none."""
        return tuple(self.stop or ())

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens is {self.min_tokens} but must be at most max_tokens, {self.max_tokens}; change either.")
        if self.stop and not self.detokenize:
            raise UserError("stop is set but needs detokenize=True, as it is sought in the text; use stop_token_ids instead.")
        if self.greedy and self.n > 1:
            raise UserError(f"n is {self.n} but must be 1 at temperature {self.temperature:g}; raise it for other completions.")


def _check_names(given: Mapping[str, object]) -> None:
    known = [field.name for field in fields(SamplingParams)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the known ones are {', '.join(known)}."
            raise UserError(f"Unknown sampling parameter {_show(name)}; {hint}")


def _id_from_json(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _show(value: object) -> str:
    """On one line, short."""
    return reprlib.repr(value)


_Check = Callable[[str, Any], object]
"""(field name, value) -> the value in its final form. Raises UserError."""


def _integer(low: int, high: int, hint: str) -> _Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
            raise UserError(f"{name} is {_show(value)} but must be an integer from {low} to {high}; {hint}.")
        return int(value)

    return check


def _real(low: float, high: float, hint: str, *, open_low: bool = False) -> _Check:
    """`open_low`: `low` itself is refused."""
    bounds = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise UserError(f"{name} is {_show(value)} but must be a number {bounds}; {hint}.")
        number = cast(float, value)
        if not low <= number <= high or (open_low and number == low):
            raise UserError(f"{name} is {_show(value)} but must be {bounds}; {hint}.")
        return float(number)

    return check


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_show(value)} but must be True or False.")
    return value


def _optional(check: _Check) -> _Check:
    return lambda name, value: None if value is None else check(name, value)


def _many(check: _Check, what: str) -> _Check:
    """A list or tuple of what passes `check`."""

    def check_all(name: str, value: object) -> tuple[object, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} is {_show(value)} but must be a list of {what}.")
        return tuple(check(f"{name}[{i}]", item) for i, item in enumerate(value))

    return check_all


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} is {_show(value)} but must be a non-empty string.")
    return value


def _stop(name: str, value: object) -> object:
    return (_text(name, value),) if isinstance(value, str) else _texts(name, value)


def _allowed(name: str, value: object) -> object:
    if not (ids := _ids(name, value)):
        raise UserError(f"{name} is empty but must hold at least one token id; None allows all.")
    return ids


def _bias(name: str, value: object) -> dict[object, object]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} is {_show(value)} but must be a mapping of token ids to numbers.")
    return {_id(f"{name} key", key): _bias_value(f"{name}[{_show(key)}]", bias) for key, bias in value.items()}


def _truncation(name: str, value: object) -> object:
    if value == 0:
        raise UserError(f"{name} is 0 but must be -1 or at least 1; None keeps the whole prompt.")
    return _integer(-1, _MANY, "-1 keeps what fits the context")(name, value)


_MANY = 2**31 - 1
_FACTOR = 1e6
"""Bound of factors that have no natural one: logits stay finite in float32."""

_id = _integer(0, _MANY, "token ids count from 0")
_ids = _many(_id, "token ids")
_texts = _many(_text, "strings")
_bias_value = _real(-_FACTOR, _FACTOR, "-100 all but forbids a token")

_CHECKS: dict[str, _Check] = {
    "n": _integer(1, 16384, "1 gives one completion"),
    "presence_penalty": _real(-2, 2, "0 switches it off"),
    "frequency_penalty": _real(-2, 2, "0 switches it off"),
    "repetition_penalty": _real(1 / _FACTOR, _FACTOR, "1 switches it off"),
    "temperature": _real(0, _FACTOR, "0 is greedy"),
    "top_p": _real(0, 1, "1 switches it off", open_low=True),
    "top_k": _integer(-1, _MANY, "0 or -1 switches it off"),
    "min_p": _real(0, 1, "0 switches it off"),
    "seed": _optional(_integer(0, 2**63 - 1, "None derives one for each request")),
    "stop": _optional(_stop),
    "stop_token_ids": _optional(_ids),
    "bad_words": _optional(_texts),
    "include_stop_str_in_output": _flag,
    "ignore_eos": _flag,
    "max_tokens": _optional(_integer(1, _MANY, "None goes on to the end of the context")),
    "min_tokens": _integer(0, _MANY, "0 switches it off"),
    "logprobs": _optional(_integer(-1, 20, "-1 returns the whole vocabulary")),
    "prompt_logprobs": _optional(_integer(-1, 20, "-1 returns the whole vocabulary")),
    "detokenize": _flag,
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "truncate_prompt_tokens": _optional(_truncation),
    "logit_bias": _optional(_bias),
    "allowed_token_ids": _optional(_allowed),
}
