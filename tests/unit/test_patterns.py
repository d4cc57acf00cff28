"""What a pattern allows once it is rewritten and compiled, against Python's own regular expressions."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar import GrammarCompiler, GrammarMatcher
from evospec.engine.sampling.json_schema import MAX_SCHEMA_CHARS, GrammarError, rewrite_pattern, rewrite_patterns

_END = 256
_BYTES = GrammarCompiler([*(bytes([byte]) for byte in range(256)), b""], [_END])

_ATOMS = st.sampled_from(["a", "x", "é", "😀", "[^a]", "[éa]", "[^é]", r"\w", "."])
_QUANTIFIERS = st.sampled_from(["", "?", "*", "+", "{1,2}", "{2,}"])


def _patterns(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda parts: st.sampled_from(["(" + "".join(parts) + ")", "(?:" + "|".join(parts) + ")"])
    )
    return st.tuples(groups, _QUANTIFIERS).map("".join)


PATTERNS = st.recursive(st.tuples(_ATOMS, _QUANTIFIERS).map("".join), _patterns, max_leaves=5)


def allows(pattern: str, text: str) -> bool:
    """Whether a string of JSON may be ``text``, as JSON would have it with as few escapes as possible."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    matcher = GrammarMatcher(_BYTES.compile(Grammar(kind="json_schema", schema=schema)))
    return all(map(matcher.accept, f'"{text}"'.encode())) and matcher.accept(_END)


@settings(max_examples=300, deadline=None)
@given(pattern=PATTERNS, texts=st.lists(st.text("axé😀", max_size=5), min_size=1, max_size=6))
def test_a_pattern_allows_what_it_matches(pattern: str, texts: list[str]) -> None:
    for text in texts:
        assert allows(f"^{pattern}$", text) == bool(re.fullmatch(pattern, text, re.ASCII)), text


@settings(max_examples=200, deadline=None)
@given(pattern=PATTERNS, texts=st.lists(st.text('axé😀"\n', max_size=5), min_size=1, max_size=6))
def test_an_expression_allows_what_it_matches(pattern: str, texts: list[str]) -> None:
    """Of whole outputs, not of strings of JSON."""
    grammar = _BYTES.compile(Grammar(kind="regex", schema=pattern))
    for text in texts:
        matcher = GrammarMatcher(grammar)
        is_allowed = all(map(matcher.accept, text.encode())) and matcher.accept(_END)
        assert is_allowed == bool(re.fullmatch(pattern, text, re.ASCII | re.DOTALL)), text


@pytest.mark.parametrize("pattern", ["^[^a]é$", "^.é$", r"^\Sé$"])
@pytest.mark.parametrize("text", ["\\é", '"é', "\né"])
def test_nothing_that_ends_a_string_is_matched(pattern: str, text: str) -> None:
    assert not allows(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(ax*)?", "(ax*){0,1}"),
        ("(ax*)??", "(ax*){0,1}?"),
        ("((x|a?){2,}e){1,}", "((x|a?){2}(x|a?)*e)+"),
        (r"(a){0,}(a){3,4}[(]{2,}", r"(a)*(a){3,4}[(]{2,}"),
        (r"[)?]\)?x?", r"[)?]\)?x?"),
        (r"[\])?é]", r"[\])?\u{E9}]"),
        (r"\é😀", r"\u{E9}\u{1F600}"),
        (r"\\)?", r"\\){0,1}"),
        ("(a){00,}(a){01,}(a){02,}", "(a)*(a)+(a){2}(a)*"),
        ("(a){999999,}", "(a){999999}(a)*"),
    ],
)
def test_only_what_is_mistaken_is_rewritten(pattern: str, expected: str) -> None:
    assert rewrite_pattern(pattern) == expected


@pytest.mark.parametrize("times", ["4294967297", "1000000,", "1,1000000", "9" * 5000 + ","])
def test_what_xgrammar_would_count_wrongly_is_refused(times: str) -> None:
    for repeated in ("a", "(a)"):
        with pytest.raises(GrammarError, match="million"):
            rewrite_pattern(f"{repeated}{{{times}}}")


def test_a_group_that_repeats_is_not_entered_where_it_ends() -> None:
    assert not allows("^(?:x{2,}|a?){2,}$", "x")
    assert allows("^(?:x{2,}|a?){2,}$", "xxa")


def test_a_pattern_that_grows_too_long_is_refused() -> None:
    with pytest.raises(GrammarError):
        rewrite_pattern("(" * 40 + "ab" + "){2,}" * 40)


def test_patterns_that_grow_too_long_together_are_refused() -> None:
    pattern = "(" * 11 + "ab" + "){2,}" * 11
    schema = json.dumps({"anyOf": [{"type": "string", "pattern": pattern}] * 9})
    assert len(rewrite_pattern(pattern)) < MAX_SCHEMA_CHARS / 3
    with pytest.raises(GrammarError):
        rewrite_patterns(schema)


@pytest.mark.parametrize("part", ["[", "[(", "[^", "[\\", "(", "(){0,}", "){9", "\\", "{", "[]"])
def test_no_pattern_takes_long(part: str) -> None:
    """To look through the rest of the pattern for each opened class takes minutes."""
    started = time.process_time()
    rewrite_pattern((part * MAX_SCHEMA_CHARS)[:MAX_SCHEMA_CHARS])
    assert time.process_time() - started < 10


def test_only_patterns_are_rewritten() -> None:
    names = {"pattern": {"type": "string", "pattern": "(a)?"}, "b": {"enum": ["(a)?", {"pattern": "(a)?"}]}}
    schema = {"properties": names, "items": {"patternProperties": {"(é)?": {"title": "(é)?"}}}}
    written = json.loads(rewrite_patterns(json.dumps(schema)))
    assert written["properties"]["pattern"]["pattern"] == "(a){0,1}"
    assert written["properties"]["b"] == names["b"]
    assert written["items"]["patternProperties"] == {r"(\u{E9}){0,1}": {"title": "(é)?"}}
    assert rewrite_patterns('{"type":  "string"}') == '{"type":  "string"}'
