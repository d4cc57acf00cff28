"""Truncation against a brute-force oracle, in any split of the tokens into steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.messages import SamplingParams
from evospec.engine.truncation import StopChecker, Truncation

EOS = 9
# Of one to five bytes; some hold part of a character.
PIECES = [b"a", b"b", b"c", b"ab", b"bca", b"\xe2", b"\x82", b"\xac", b"abcab", b""]  # euro sign in three; 9 is EOS


def params(max_tokens: int = 100, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, **changes)


def run(p: SamplingParams, steps: list[list[int]], num_prompt: int = 5, max_model_len: int = 1000) -> Truncation:
    """The whole output's truncation: ``num_kept`` counts over all steps."""
    checker = StopChecker(p, num_prompt, max_model_len, (EOS,), PIECES.__getitem__)
    kept = 0
    for step in steps:
        truncation = checker.push(step)
        kept += truncation.num_kept
        if truncation.finish_reason is not None:
            return Truncation(kept, truncation.finish_reason, truncation.stop_reason, truncation.text_length)
        assert truncation.num_kept == len(step)
    return Truncation(kept)


def text_of(ids: list[int]) -> str:
    """The tokens' text without a last character that later tokens could complete."""
    data = b"".join(PIECES[i] for i in ids)
    for beginning in (b"\xe2\x82", b"\xe2"):
        data = data.removesuffix(beginning)
    return data.decode(errors="replace")


def oracle(p: SamplingParams, ids: list[int], num_prompt: int, max_model_len: int) -> Truncation:
    """Ends at the first token whose prefix of the output satisfies some rule, looked at afresh each time."""
    for n in range(1, len(ids) + 1):
        token = ids[n - 1]
        if n > p.min_tokens:
            if token == EOS and not p.ignore_eos:
                return Truncation(n, "stop")
            if token in p.stop_token_ids:
                return Truncation(n, "stop", token)
            text, seen = text_of(ids[:n]), len(text_of(ids[: n - 1]))
            for end in range(seen + 1, len(text) + 1):
                if found := [s for s in p.stop if text[:end].endswith(s)]:
                    longest = max(found, key=len)
                    return Truncation(n, "stop", longest, end - len(longest))
        if n == p.max_tokens or num_prompt + n == max_model_len:
            return Truncation(n, "length")
    return Truncation(len(ids))


@settings(max_examples=400)
@given(st.data())
def test_equals_the_oracle_in_any_split(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 9), max_size=20))
    p = params(
        max_tokens=data.draw(st.integers(1, 25)),
        stop=tuple(data.draw(st.lists(st.text("abc€", min_size=1, max_size=5), max_size=3))),
        stop_token_ids=tuple(data.draw(st.lists(st.integers(0, 9), max_size=1))),
        ignore_eos=data.draw(st.booleans()),
        min_tokens=data.draw(st.sampled_from([0, 0, 3, 10])),
    )
    max_model_len = 5 + data.draw(st.integers(1, 25))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    steps = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert run(p, steps, 5, max_model_len) == oracle(p, ids, 5, max_model_len)


def test_tokens_after_the_end_are_dropped() -> None:
    assert run(params(), [[0, EOS, 1, 1]]) == Truncation(2, "stop")
    assert run(params(max_tokens=3), [[0, 0], [0, 0]]) == Truncation(3, "length")
    assert run(params(), [[0, 0, 0]], num_prompt=8, max_model_len=10) == Truncation(2, "length")


def test_stop_string_across_tokens_and_characters() -> None:
    """'ca€' ends with a character of three tokens."""
    assert run(params(stop=("ca€",)), [[3, 4, 5], [6], [7, 0]]) == Truncation(5, "stop", "ca€", 3)


def test_stop_string_wins_over_length_and_end_token_over_stop_string() -> None:
    assert run(params(max_tokens=2, stop=("ab",)), [[0, 1]]) == Truncation(2, "stop", "ab", 0)
    assert run(params(stop_token_ids=(1,), stop=("ab",)), [[0, 1]]) == Truncation(2, "stop", 1)


@pytest.mark.parametrize("stop", [("abcab", "bc"), ("bc", "abcab")])
def test_stop_string_complete_first_wins(stop: tuple[str, ...]) -> None:
    """Within one token as across tokens, in whatever order they are listed."""
    assert run(params(stop=stop), [[8]]) == Truncation(1, "stop", "bc", 1)
    assert run(params(stop=stop), [[0, 1, 2, 0, 1]]) == Truncation(3, "stop", "bc", 1)


def test_min_tokens_suppresses_every_stop() -> None:
    p = params(min_tokens=3, stop=("ab",), stop_token_ids=(4,))
    assert run(p, [[3, 4, EOS, 2, 2]]) == Truncation(5)
    assert run(p, [[3, 4, EOS, EOS]]) == Truncation(4, "stop")
    assert run(p, [[2, 2, 0, 1]]) == Truncation(4, "stop", "ab", 2)


def test_ignore_eos() -> None:
    assert run(params(ignore_eos=True), [[0, EOS, 1]]) == Truncation(3)
