"""Bodies as strict JSON, bounded by what they hold."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.server import json_bodies
from evospec.server.errors import ApiError
from evospec.server.json_bodies import MAX_CONTAINERS, MAX_STRINGS, MAX_VALUES, decode_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.sampled_from('a"\\[{,]}é')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('k"\\,[')), inner),
)


def count(value: object) -> tuple[int, int, int]:
    """Strings (keys, too), lists and objects, and commas in ``value``."""
    if isinstance(value, list | dict):
        inner = [count(one) for one in (value.values() if isinstance(value, dict) else value)]
        strings, containers, commas = (sum(counts) for counts in zip(*inner, strict=True)) if inner else (0, 0, 0)
        return strings + (len(value) if isinstance(value, dict) else 0), containers + 1, commas + max(0, len(value) - 1)
    return int(isinstance(value, str)), 0, 0


@given(VALUES, st.booleans())
def test_a_body_is_refused_exactly_when_it_holds_more_than_a_bound(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    strings, containers, commas = count(value)
    for bound, held in (("MAX_STRINGS", strings), ("MAX_CONTAINERS", containers), ("MAX_VALUES", commas)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_bodies, bound, held)
            assert decode_json(body) == value
            patch.setattr(json_bodies, bound, held - 1)
            if held:
                with pytest.raises(ApiError, match="more than"):
                    decode_json(body)


@given(st.binary(max_size=40) | st.text(st.sampled_from('"\\[]{},:a1 \n')).map(str.encode))
def test_whatever_is_no_json_is_the_clients_error(body: bytes) -> None:
    try:
        expected = msgspec.json.decode(body)
    except (ValueError, msgspec.MsgspecError):
        with pytest.raises(ApiError) as caught:
            decode_json(body)
        assert caught.value.status == 400
    else:
        assert decode_json(body) == expected


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[" + b",".join([b'"a"'] * (MAX_STRINGS + 1)) + b"]", "strings"),
        (b"[" + b",".join([b"[]"] * MAX_CONTAINERS) + b"]", "lists and objects"),
        (b"[" + b",".join([b"{}"] * MAX_CONTAINERS) + b"]", "lists and objects"),
        (b"[" + b",".join([b"1"] * (MAX_VALUES + 2)) + b"]", "values"),
        (b"[" + b",".join([b"[]"] * 2 * MAX_CONTAINERS), "lists and objects"),
    ],
)
def test_what_is_too_much_is_named(body: bytes, what: str) -> None:
    with pytest.raises(ApiError, match=f"more than .* {what}"):
        decode_json(body)


@pytest.mark.parametrize("text", ['",[{' * 400_000, "\\" * 1_000_000, '\\"' * 600_000, "x" * 4_000_000])
def test_what_stands_in_a_string_counts_nothing(text: str) -> None:
    assert decode_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}
