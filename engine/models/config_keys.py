"""Reads a model's configuration by the keys of a Hugging Face ``config.json``, with types checked. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from evospec.engine.models.config import MAX_SIZE, ModelError

_Number = TypeVar("_Number", int, float)
_MAX_NUMBER = 1e30


class ConfigKeys:
    """A JSON object. A key whose value is null is absent; every method raises ``ModelError`` for a wrong type."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def number(self, key: str, kind: type[_Number], default: _Number | None = None) -> _Number:
        """A number; ``default`` where the key is absent, an error where there is none."""
        value: Any = self.values.get(key)
        if value is None:
            value = default
        if type(value) not in ((int,) if kind is int else (int, float)) or not _is_ordinary(value):
            raise ModelError(f"{key} is {value!r:.40}, must be of type {kind.__name__}")
        return kind(value)

    def size(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """A number of 1 to ``most``; ``default`` as for ``number``."""
        value = self.number(key, int, default)
        if not 0 < value <= most:
            raise ModelError(f"{key} is {value}, must be 1 to {most}")
        return value

    def optional(self, key: str, kind: type[_Number]) -> _Number | None:
        """A number, or None where the key is absent."""
        return None if self.values.get(key) is None else self.number(key, kind)

    def flag(self, key: str, default: bool = False) -> bool:
        """Whether a key is true; ``default`` where it is absent."""
        value = self.values.get(key)
        return default if value is None else bool(value)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key) or default
        if not isinstance(value, str):
            raise ModelError(f"{key} is {value!r}, must be a string")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) in (int, float) and _is_ordinary(item) for item in value):
            raise ModelError(f"{key} is {value!r:.40}, must be a list of numbers")
        return tuple(map(float, value))

    def items(self, key: str, count: int) -> list[Any]:
        """A list of ``count`` values, or none where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) < count:
            raise ModelError(f"{key} is {value!r:.40}, must be a list of {count}")
        return value[:count]

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, a list, or none."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(item) is int for item in ids):
            raise ModelError(f"{key} is {value!r}, must be an integer or a list of integers")
        return tuple(ids)

    def section(self, *keys: str) -> ConfigKeys:
        """The first of some objects that is there and not empty; an empty one where none is."""
        value: Any = next((self.values[key] for key in keys if self.values.get(key)), {})
        if not isinstance(value, Mapping):
            raise ModelError(f"{keys[0]} is {value!r:.40}, must be an object")
        return ConfigKeys(value)

    def refuse(self, *keys: str) -> None:
        """Raises ``ModelError``, which names them, where any of these features is asked for."""
        refused = [f"{key} = {self.values[key]!r:.60}" for key in keys if self.values.get(key)]
        if refused:
            raise ModelError("not supported: " + ", ".join(refused))


def _is_ordinary(value: float) -> bool:
    """Whether a number is finite, and small enough to be computed with."""
    return -_MAX_NUMBER <= value <= _MAX_NUMBER
