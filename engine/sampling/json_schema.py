"""Which JSON Schemas can be enforced while generating, and how xgrammar is told of their patterns.

Torch-free: the server refuses other schemas early.

xgrammar 0.2 mistakes three forms of patterns. ``(ax*)?`` matches ``x``, too: its optional groups are entered where
they end; ``{0,1}`` says the same and is taken right. ``(x{2,}|a?){2,}`` matches ``x``; ``(..){2}(..)*`` does not. And
where a pattern has a character beyond ASCII, what is negated in it, and the dot, match quotation marks and backslashes
as well, which would end the string; written as ``\\u{...}`` it does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 50
_MAX_PLACE_CHARS = 200

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    "discriminator",  # OpenAPI's and pydantic's: where to look first for which of ``oneOf`` holds
}
DEFINITIONS = {"$defs", "definitions", "$schema", "$id"}
_UNSUPPORTED = (
    *("not", "if", "then", "else", "$dynamicRef"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
    *("contains", "minContains", "maxContains"),
)
_STRING_LENGTHS = {"minLength", "maxLength"}
_GIVES_TYPE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format", "propertyNames"), ()),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), ()),
    **dict.fromkeys(("minItems", "maxItems"), ("items", "prefixItems")),
    **dict.fromkeys(("minProperties", "maxProperties", "patternProperties"), ("properties",)),
}
"""Keywords that xgrammar ignores where neither ``type`` nor one of these says what they are about."""
_ONE_SCHEMA = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames")
_SCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_PART = re.compile(r"(\\?[^\x00-\x7f]|\\.|\[(?:\\.|[^\]\\])*\]?|\(|\)(?:\?|\{[0-9]+,\})?)", re.DOTALL)
"""A character beyond ASCII (a backslash before it means nothing), an escape, a class, the begin or end of a group.

A class that does not end is one up to the pattern's end, so that the text behind it is not looked through again.
"""
_TOO_OFTEN = re.compile(r"\{(?:[0-9]+,)?[0-9]{7,}[,}]")
"""A number of repeats that xgrammar, which counts in 32 bits, may take for another."""
_NOT_ASCII = re.compile(r"\\?([^\x00-\x7f])")


class GrammarError(ValueError):
    """Constraints on the output that cannot be enforced; the message is fit for the client."""


def check_json_schema(text: str) -> None:
    """Refuse a schema that would be enforced in part only.

    What remains to be found when it is compiled: wrong types, unknown references, bad patterns, and what it costs.
    ``oneOf`` is enforced as ``anyOf``, ``format`` as far as known, and an object is closed unless its
    schema says otherwise.

    Raises:
        GrammarError: the schema is not JSON, too long or too deep, or uses a keyword that is not supported.
    """
    if len(text) > MAX_SCHEMA_CHARS:
        raise GrammarError(f"the JSON schema is longer than {MAX_SCHEMA_CHARS} characters")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not valid JSON: {error}") from error
    for path, part in subschemas(schema):
        if len(path) > MAX_SCHEMA_DEPTH + 1:
            raise GrammarError(f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        if not isinstance(part, (dict, bool)):
            raise GrammarError(f"the JSON schema at {_place(path)} must be an object or a boolean")
        if isinstance(part, dict) and (problem := _problem(part)):
            raise GrammarError(f"the JSON schema at {_place(path)} is not supported: {problem}")


def annotations_in(schema: dict[str, Any]) -> set[str]:
    """The keywords of a schema that constrain nothing."""
    return {keyword for keyword in schema if keyword in _ANNOTATIONS or keyword.startswith("x-")}


def subschemas(root: Any) -> Iterator[tuple[list[str], Any]]:
    """A schema and all below it, each with the path to it; schemas may be of any type here.

    It is always the same list: all paths of a schema are together as long as its square.
    """
    levels, path = [iter([("#", root)])], [""]
    while levels:
        for step, schema in levels[-1]:
            path[-1] = step
            yield path, schema
            if isinstance(schema, dict):
                levels.append(_children(schema))
                path.append("")
                break
        else:
            levels.pop()
            path.pop()


def rewrite_pattern(pattern: str, *, to_ascii: bool = True) -> str:
    """The same regular expression, with neither ``?`` nor ``{n,}`` after a group and, for a string of JSON, in ASCII.

    Raises:
        GrammarError: it is too long, or repeats something too often.
    """
    if _TOO_OFTEN.search(pattern):
        raise GrammarError("a pattern repeats something a million times or more")
    written, groups = "", []
    for part in _PART.split(pattern):
        if part == "(":
            groups.append(len(written))
        begin = groups.pop() if part.startswith(")") and groups else len(written)
        if part == ")?":
            written += "){0,1}"
        elif part.startswith("){"):
            least = part[2:-2].lstrip("0")
            written += {"": ")*", "1": ")+"}.get(least) or f"){{{least}}}{written[begin:]})*"
        else:
            written += _NOT_ASCII.sub(lambda found: f"\\u{{{ord(found[1]):X}}}", part) if to_ascii else part
        if len(written) > MAX_SCHEMA_CHARS:
            raise GrammarError(f"a pattern has more than {MAX_SCHEMA_CHARS} characters with its repeated groups")
    return written


def rewrite_patterns(text: str) -> str:
    """A schema that ``check_json_schema`` has taken, with its patterns rewritten; the same text if none needs it.

    Raises:
        GrammarError: they are too long, each or in all.
    """
    root, num_chars = json.loads(text), 0
    for _, schema in subschemas(root):
        if isinstance(schema, dict):
            _rewrite_own_patterns(schema)
            num_chars += sum(map(len, _patterns(schema)))
        if num_chars > MAX_SCHEMA_CHARS:
            raise GrammarError(f"all patterns have more than {MAX_SCHEMA_CHARS} characters with their repeated groups")
    return text if root == json.loads(text) else json.dumps(root)


def has_string_lengths(tag: str) -> bool:
    """Whether a structural tag has schemas that bound the length of strings."""
    formats = [json.loads(tag)["format"]]
    while formats:
        part = formats.pop()
        if isinstance(part, dict) and part.get("type") == "json_schema":
            schemas = (schema for _, schema in subschemas(part["json_schema"]))
            if any(isinstance(schema, dict) and schema.keys() & _STRING_LENGTHS for schema in schemas):
                return True
        else:
            formats += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return False


def _place(path: list[str]) -> str:
    place = "/".join(path)
    return place if len(place) <= _MAX_PLACE_CHARS else f"{place[:_MAX_PLACE_CHARS]}…"


def _problem(schema: dict[str, Any]) -> str | None:
    """What of this schema, apart from its subschemas, cannot be enforced."""
    keywords = schema.keys() - annotations_in(schema) - DEFINITIONS
    for keyword in _UNSUPPORTED:
        if keyword in keywords:
            return keyword
    if "allOf" in keywords and (not isinstance(schema["allOf"], list) or len(schema["allOf"]) != 1):
        return "allOf of more than one schema"
    if schema.get("uniqueItems"):
        return "uniqueItems"
    for combiner in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const"):
        if combiner in keywords and keywords - {combiner, "type"}:
            return f"{combiner} beside {', '.join(sorted(keywords - {combiner, 'type'}))}"
    if "$ref" in keywords and not str(schema["$ref"]).startswith("#"):
        return "$ref to another document"
    for keyword in ("pattern", "format"):
        if keyword in keywords and keywords & _STRING_LENGTHS:
            return f"{keyword} beside minLength or maxLength"
    for keyword, givers in _GIVES_TYPE.items():
        if keyword in keywords and not keywords & {"type", *givers}:
            return f"{keyword} without type"
    if unnamed := _required(schema) - _named(schema):
        return f"required of {', '.join(sorted(unnamed))}, which properties do not have"
    if "multipleOf" in keywords and schema.get("type") != "integer":
        return "multipleOf of a type other than integer"
    for keyword in ("propertyNames", "patternProperties"):
        if {keyword, "properties"} <= keywords:
            return f"{keyword} beside properties"
    if any('"' in pattern or "\\\\" in pattern for pattern in _patterns(schema)):
        return "a pattern of a quotation mark or a backslash, which JSON writes otherwise"
    return None


def _rewrite_own_patterns(schema: dict[str, Any]) -> None:
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = rewrite_pattern(pattern)
    if isinstance(named := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {rewrite_pattern(name): child for name, child in named.items()}


def _named(schema: dict[str, Any]) -> set[str]:
    properties = schema.get("properties")
    return set(properties) if isinstance(properties, dict) else set()


def _patterns(schema: dict[str, Any]) -> list[str]:
    """The regular expressions of this schema, apart from its subschemas."""
    named = schema.get("patternProperties")
    patterns = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def _required(schema: dict[str, Any]) -> set[str]:
    """The properties that the schema's own list requires."""
    names = schema.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The subschemas, each with where it is."""
    for keyword in _ONE_SCHEMA:
        if keyword in schema:
            yield keyword, schema[keyword]
    for keyword in _SCHEMA_LISTS:
        if isinstance(schema.get(keyword), list):
            yield from ((f"{keyword}/{i}", child) for i, child in enumerate(schema[keyword]))
    for keyword in _SCHEMA_MAPS:
        if isinstance(schema.get(keyword), dict):
            yield from ((f"{keyword}/{name}", child) for name, child in schema[keyword].items())
