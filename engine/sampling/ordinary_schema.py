"""Which grammars are ordinary: of a form whose masks are cheap at every place of every text. Torch-free.

Masks are slow where many ways to go on stay open at once, since each token is tried along all of them. The branches of
a union and the optional properties of an object open ways, so they are counted; of patterns, and of objects that allow
properties beside those they name, a few words make any number, so nothing with them is ordinary. The bounds are such
that a mask, or a token, takes well below a millisecond in any text (``benchmarks/attack/in_place.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from evospec.engine.messages import Grammar
from evospec.engine.sampling.json_schema import DEFINITIONS, annotations_in

_MAX_SCHEMAS = 256
"""Subschemas, each counted as often as it is referred to: too few for one that contains itself."""
_MAX_WAYS = 16
_WAYS_OF_A_BRANCH = 4
"""Branches may differ late, when each has got a place of its own within the text; properties differ by their names."""
_MAX_ITEMS, _MAX_LENGTH, _MAX_VALUES = 128, 4096, 256
_BOUNDS = {"minLength": _MAX_LENGTH, "maxLength": _MAX_LENGTH, "minItems": _MAX_ITEMS, "maxItems": _MAX_ITEMS}
_KEYWORDS = {"type", "properties", "required", "additionalProperties", "items", "anyOf", "$ref", "enum", "const"}
_ORDINARY = _KEYWORDS | {"minimum", "maximum"} | _BOUNDS.keys() | DEFINITIONS


def is_ordinary(grammar: Grammar) -> bool:
    """Whether a grammar that could be compiled is ordinary."""
    if grammar.kind != "json_schema" or grammar.schema is None:
        return grammar.kind == "json_object"
    schema = json.loads(grammar.schema)
    try:
        return _Survey(schema).num_ways(schema) <= _MAX_WAYS
    except (_Extraordinary, TypeError, AttributeError):  # xgrammar overlooks some values of a wrong type
        return False


class _Extraordinary(Exception):
    """A schema of another form, or too large."""


class _Survey:
    """Visits a schema and its subschemas. ``root``: where references begin."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._num_visited = 0

    def num_ways(self, schema: Any) -> int:
        """How many ways to go on are open at once, at most; raises ``_Extraordinary``."""
        self._num_visited += 1
        if schema is True:
            return 1
        if self._num_visited > _MAX_SCHEMAS or not isinstance(schema, dict):
            raise _Extraordinary
        if schema.keys() - annotations_in(schema) - _ORDINARY:
            raise _Extraordinary
        if any(schema.get(keyword, 0) > bound for keyword, bound in _BOUNDS.items()):
            raise _Extraordinary
        if "$ref" in schema:
            return self.num_ways(self._resolve(schema["$ref"]))
        if "anyOf" in schema:
            return sum(max(_WAYS_OF_A_BRANCH, self.num_ways(branch)) for branch in schema["anyOf"])
        if len(schema.get("enum", ())) > _MAX_VALUES:
            raise _Extraordinary
        types = schema.get("type", "any")
        of_items = self._most([schema["items"]] if schema.get("items") else [])
        return (1 if isinstance(types, str) else len(types)) * max(self._object(schema), of_items)

    def _object(self, schema: dict[str, Any]) -> int:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", False)
        if properties and others is not False:
            raise _Extraordinary
        num_optional = len(properties.keys() - set(schema.get("required", ())))
        return max(1 + num_optional, self._most(properties.values()), self._most([others] if others else []))

    def _most(self, schemas: Iterable[Any]) -> int:
        return max(map(self.num_ways, schemas), default=1)

    def _resolve(self, reference: str) -> Any:
        """What ``#/$defs/Name`` names."""
        match reference.split("/"):
            case ["#", "$defs" | "definitions" as place, name] if name in self._root.get(place, {}):
                return self._root[place][name]
        raise _Extraordinary
