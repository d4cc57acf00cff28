"""Which schemas' masks the engine computes itself."""

from __future__ import annotations

from typing import Any

import pytest

from evospec.engine.messages import Grammar
from evospec.engine.sampling.ordinary_schema import is_ordinary
from tests.grammars import schema

STRING = {"type": "string", "maxLength": 30}


def optional(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": STRING for i in range(count)}}


def any_of(*branches: Any) -> dict[str, Any]:
    return {"anyOf": list(branches)}


def referring(name: str) -> dict[str, Any]:
    return {"$defs": {"a": any_of({"$ref": f"#/$defs/{name}"}, {"type": "null"}), "b": STRING}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    "value",
    [
        optional(15),
        {"type": "object", "properties": {f"p{i}": any_of(STRING, {"type": "null"}) for i in range(15)}},
        {"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": 128},
        {"type": "object", "additionalProperties": STRING},
        {"enum": list(range(256))},
        any_of(*[STRING] * 4),
        referring("b"),
        any_of(STRING, STRING) | {"discriminator": {"propertyName": "a"}, "x-order": 1},
        True,
    ],
)
def test_ordinary(value: Any) -> None:
    assert is_ordinary(schema(value))


@pytest.mark.parametrize(
    "value",
    [
        optional(16),
        any_of(*[STRING] * 5),
        any_of(*[optional(8)] * 2),
        any_of(any_of(STRING, STRING, STRING), STRING, STRING),
        {"type": "object", "properties": {"p": STRING}, "additionalProperties": True},
        optional(300) | {"required": [f"p{i}" for i in range(300)]},
        {"type": "array", "maxItems": 129},
        {"type": "string", "minLength": 4097},
        {"enum": list(range(257))},
        {"type": "string", "pattern": "a"},
        {"type": "array", "items": {"type": "string", "format": "date"}},
        referring("a"),
        {"$ref": "#"},
        {"type": "string", "maxLength": "3"},
        {"anyOf": 3},
        False,
    ],
)
def test_not_ordinary(value: Any) -> None:
    assert not is_ordinary(schema(value))


def test_any_object_is_ordinary() -> None:
    assert is_ordinary(Grammar("json_object"))
