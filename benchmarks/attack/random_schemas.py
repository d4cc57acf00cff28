"""Random JSON schemas, many of them odd: patterns that nest, bounds that exclude each other, references in circles."""

from __future__ import annotations

import random
from typing import Any

_ATOMS = (
    "a", "b", ".", r"\d", r"\w", r"\s", "[a-z]", "[^a]", r"\.", "é", "😀", r"\n", r"\u0041", r"[\d-]", "x", r"\b",
    r"\t", r"\/", '"', r"\\", r"\"",
)  # fmt: skip
_REPEATS = ("*", "+", "?", "{0,3}", "{2}", "{1,}", "{0}", "*?", "{0,1}")
_SIMPLE: tuple[Any, ...] = (
    {}, True, *({"type": name} for name in ("string", "integer", "null", "boolean", "number", "object", "array")),
)  # fmt: skip
_VALUES: tuple[Any, ...] = ("a", "ab", 1, None, True, {"a": 1}, [1, 2], "\n", "é", 1.5, "", {}, [], "\u2028", "\0")
_NAMES = ("a", "b", "c", "", "é", '"', "a b", "\\")
_MOST_DEPTH = 3


class RandomSchemas:
    """Makes one schema after another; the same ``seed`` makes the same ones."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._kinds = (
            self._pattern, self._lengths, self._bounds, self._values, self._one_of, self._reference, self._array,
            self._object,
        )  # fmt: skip

    def next(self) -> dict[str, Any]:
        """A schema with everything that its references name."""
        schema = self._object() if self._is(0.3) else self._schema(0)
        if schema is True or "$ref" in str(schema):
            definitions = {name: self._schema(_MOST_DEPTH) for name in ("a", "b")}
            return {"anyOf": [schema], "$defs": definitions}
        return dict(schema)

    def _is(self, probability: float) -> bool:
        return self._chance.random() < probability

    def _some(self, key: str, values: tuple[Any, ...], probability: float) -> dict[str, Any]:
        return {key: self._chance.choice(values)} if self._is(probability) else {}

    def _schema(self, depth: int) -> Any:
        if depth > _MOST_DEPTH or self._is(0.12):
            return self._chance.choice(_SIMPLE)
        return self._chance.choice(self._kinds)(depth)

    def expression(self, depth: int = 0) -> str:
        kind = self._chance.random()
        if depth > 4 or kind < 0.35:
            return self._chance.choice(_ATOMS)
        inner = self.expression(depth + 1)
        if kind < 0.6:
            return inner + self.expression(depth + 1)
        if kind < 0.7:
            return f"({inner}|{self.expression(depth + 1)})"
        if kind < 0.78:
            return self._chance.choice((f"(?:{inner})", f"(|{inner})"))
        return f"({inner}){self._chance.choice(_REPEATS)}"

    def _pattern(self, depth: int) -> dict[str, Any]:
        start, end = "^" * self._is(0.8), "$" * self._is(0.8)
        return {"type": "string", "pattern": f"{start}{self.expression()}{end}"}

    def _lengths(self, depth: int) -> dict[str, Any]:
        lengths = (0, 1, 5, 100)
        return {"type": "string", **self._some("minLength", lengths, 0.6), **self._some("maxLength", lengths, 0.6)}

    def _bounds(self, depth: int) -> dict[str, Any]:
        return {
            "type": self._chance.choice(("integer", "number")),
            self._chance.choice(("minimum", "exclusiveMinimum")): self._chance.choice((-5, 0, 7, -(10**9), 1e-9, -1e3)),
            self._chance.choice(("maximum", "exclusiveMaximum")): self._chance.choice((0, 5.5, 10**9, 10**17, 99)),
        }

    def _values(self, depth: int) -> dict[str, Any]:
        if self._is(0.4):
            return {"const": self._chance.choice(_VALUES)}
        return {"enum": self._chance.choices(_VALUES, k=self._chance.randint(1, 4))}

    def _one_of(self, depth: int) -> dict[str, Any]:
        several = [self._schema(depth + 1) for _ in range(self._chance.randint(1, 4))]
        key = self._chance.choice(("anyOf", "oneOf", "allOf"))
        return {key: several[:1] if key == "allOf" else several}

    def _reference(self, depth: int) -> dict[str, Any]:
        return {"$ref": self._chance.choice(("#", "#/$defs/a", "#/$defs/b"))}

    def _array(self, depth: int) -> dict[str, Any]:
        lengths = (0, 1, 3, 50)
        schema = {"type": "array", **self._some("minItems", lengths, 0.4), **self._some("maxItems", lengths, 0.4)}
        if self._is(0.8):
            schema["items"] = self._schema(depth + 1)
        if self._is(0.3):
            schema["prefixItems"] = [self._schema(depth + 1) for _ in range(self._chance.randint(1, 3))]
        return schema

    def _object(self, depth: int = 0) -> dict[str, Any]:
        names = self._chance.sample(_NAMES, self._chance.randint(0, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._schema(depth + 1) for name in names}}
        if self._is(0.6):
            schema["required"] = self._chance.sample(names, self._chance.randint(0, len(names)))
        if self._is(0.3):
            schema["additionalProperties"] = self._chance.choice((True, False, self._schema(depth + 1)))
        if self._is(0.1):
            schema["patternProperties"] = {self.expression(): self._schema(depth + 1)}
        if self._is(0.1):
            schema["propertyNames"] = {"type": "string", "pattern": self.expression()}
        return schema | self._some("minProperties", (0, 1, 3), 0.15) | self._some("maxProperties", (0, 1, 3, 10), 0.15)
