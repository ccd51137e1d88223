"""What callers pass as prompts, in one form. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from rowcast.errors import UserError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids (a list or an array), or vLLM's {"prompt": text} and {"prompt_token_ids": ids}."""


def each_prompt(prompts: object) -> list[str | list[int]]:
    """One prompt or a list of them -> a list of texts and lists of ids. Raises UserError for what is neither."""
    given = _listed(prompts)
    if isinstance(given, (str, Mapping)) or (isinstance(given, list) and given and _is_id(given[0])):
        return [_one(given)]
    if not isinstance(given, list):
        raise UserError(f"prompts are {_show(given)}: give text, a list of token ids, or a list of those")
    return [_one(prompt, f" {i} of {len(given)}") for i, prompt in enumerate(given, start=1)]


def _one(prompt: object, which: str = "") -> str | list[int]:
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
            raise UserError(f"prompt{which} has the keys {_show(list(prompt))}: give prompt or prompt_token_ids")
        prompt = next(iter(prompt.values()))
    given = _listed(prompt)
    if isinstance(given, str):
        if not given:
            raise UserError(f"prompt{which} is empty: give at least one character")
        return given
    if not isinstance(given, list) or not all(map(_is_id, given)):
        raise UserError(f"prompt{which} is {_show(given)}: give text or a list of token ids")
    return [int(token) for token in given]


def _listed(value: Any) -> object:
    """Arrays and sequences as lists; anything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _show(value: object) -> str:
    return f"{value!r:.60}"
