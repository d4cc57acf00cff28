"""Patterns of a JSON Schema in words that xgrammar 0.2 takes right. Torch-free.

It mistakes two forms. ``(ax*)?`` matches ``x``, too: its optional groups are entered where they end; ``{0,1}`` says the
same and is taken right. And where a pattern has a character beyond ASCII, what is negated in it, and the dot, match
quotation marks and backslashes as well, which would end the string; written as ``\\u{...}`` it does not.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.sampling.json_schema import subschemas

_PART = re.compile(r"\\?[^\x00-\x7f]|\\.|\[(?:\\.|[^\]\\])*\]|\)\?", re.DOTALL)
"""A character beyond ASCII (a backslash before it means nothing), an escape, a class, the end of an optional group."""


def _rewritten_part(part: str) -> str:
    if part == ")?":
        return "){0,1}"
    return re.sub(r"\\?([^\x00-\x7f])", lambda found: f"\\u{{{ord(found[1]):X}}}", part)


def rewrite_pattern(pattern: str) -> str:
    """The same regular expression, in ASCII and without ``?`` after a group."""
    return _PART.sub(lambda found: _rewritten_part(found[0]), pattern)


def rewrite_patterns(text: str) -> str:
    """A schema that ``check_json_schema`` has taken, with its patterns rewritten; the same text if none needs it."""
    root = json.loads(text)
    has_changed = False
    for _, _, schema in subschemas(root):
        has_changed |= isinstance(schema, dict) and _rewrite(schema)
    return json.dumps(root) if has_changed else text


def _rewrite(schema: dict[str, Any]) -> bool:
    """Rewrite the patterns of one schema, apart from its subschemas; returns whether that changed any."""
    before = schema.get("pattern"), schema.get("patternProperties")
    pattern, named = before
    if isinstance(pattern, str):
        schema["pattern"] = rewrite_pattern(pattern)
    if isinstance(named, dict):
        schema["patternProperties"] = {rewrite_pattern(name): child for name, child in named.items()}
    return before != (schema.get("pattern"), schema.get("patternProperties"))
