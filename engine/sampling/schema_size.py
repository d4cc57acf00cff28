"""What makes a JSON Schema slow to compile, beside its patterns and its depth. Torch-free.

Measured with xgrammar on one core and 49,152 tokens; a larger vocabulary takes longer in proportion.
``minItems``, ``maxItems``, ``enum``, ``format`` and the required properties of closed objects cost next to nothing.
"""

from __future__ import annotations

from typing import Any

MAX_STRING_BOUNDS = 600
"""Of all strings together, each pair of bounds once: 20 ms for each character, so these take about ten seconds."""
_LONGEST_COUNTED = 150
"""Longer strings take hardly longer: three seconds with a bound of 150, less than four with 1000."""
MAX_OPEN_PROPERTIES = 500
"""Of all objects that admit further properties: 20 ms for each that is named, required or not."""
MAX_OPTIONAL_PROPERTIES = 1000
"""In one object, ten seconds: time grows with their square at least."""
MAX_COUNTED_PROPERTIES = 100
"""The same in an object that says how many it has: four seconds, and 200 would take more than 30."""


class SchemaSize:
    """Of a schema and its subschemas, one after the other."""

    def __init__(self) -> None:
        self._bounds: set[tuple[int, int]] = set()
        self._open = 0
        self._optional = 0.0

    def add(self, schema: dict[str, Any]) -> None:
        """Count one schema without its subschemas; of wrong types nothing."""
        self._bounds.add((_count(schema, "minLength"), _count(schema, "maxLength")))
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return
        if schema.get("additionalProperties", schema.get("unevaluatedProperties", False)) is not False:
            self._open += len(properties)
        most = MAX_COUNTED_PROPERTIES if schema.keys() & {"minProperties", "maxProperties"} else MAX_OPTIONAL_PROPERTIES
        self._optional += (len(properties.keys() - required_names(schema)) / most) ** 2

    def problem(self) -> str | None:
        """Why all this would take too long; None where it does not."""
        bounds = sum(min(max(pair), _LONGEST_COUNTED) for pair in self._bounds)
        if bounds > MAX_STRING_BOUNDS:
            return (
                f"strings of too many different lengths: each pair of minLength and maxLength counts once, as at most "
                f"{_LONGEST_COUNTED}, and together they are {bounds}, more than {MAX_STRING_BOUNDS}"
            )
        if self._open > MAX_OPEN_PROPERTIES:
            return f"{self._open} properties beside additionalProperties, more than {MAX_OPEN_PROPERTIES}"
        if self._optional > 1:
            return (
                f"too many optional properties: an object may have {MAX_OPTIONAL_PROPERTIES}, "
                f"or {MAX_COUNTED_PROPERTIES} beside minProperties or maxProperties"
            )
        return None


def required_names(schema: dict[str, Any]) -> set[str]:
    """The properties that a schema requires, by its own list alone."""
    names = schema.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _count(schema: dict[str, Any], keyword: str) -> int:
    value = schema.get(keyword)
    return max(value, 0) if isinstance(value, int) else 0
