"""Typed reads from a model's config: every wrong value is one sentence that names key, value and bound. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rowcast.errors import UserError
from rowcast.runtime.spec import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Fields:
    """One level of a config. `path` is where it lies in the whole, for messages. Reads raise UserError for a wrong value."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """The value, `default` where the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int, *, alias: str = "", most: int = 2**24) -> int:
        """A whole number from 1 to `most`, under `key` or its older name `alias`."""
        if key not in self.values and alias in self.values:
            key = alias
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(key, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A number above 0, not below `least`, at most 1e12; required without a default."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= 1e12 or value < least:
            raise self.wrong(key, f"a number of at least {least:g}" if least else "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def activation(self, key: str, default: str) -> Activation:
        """An activation function, by Transformers' name."""
        name = self.get(key, default)
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self.wrong(key, f"one of {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def section(self, key: str) -> Fields:
        """The mapping under `key`, empty where it is missing."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a mapping")
        return Fields(value, f"{self.path}{key}.")

    def refuse(self, key: str, fix: str, *, allowed: tuple[Any, ...] = (False, 0, {}, [])) -> None:
        """Raise unless the key is missing, null or has a value that changes nothing."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise UserError(f"the model's config has {self.path}{key} = {short(value)}, which is not supported: {fix}")

    def wrong(self, key: str, expected: str) -> UserError:
        """The error for a bad value under `key`; `expected` completes "it must be"."""
        value = short(self.values.get(key)) if key in self.values else "missing"
        return UserError(f"the model's config has {self.path}{key} = {value}, it must be {expected}: correct config.json")


def short(value: object) -> str:
    """`repr` cut to 60 characters, for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
