"""The reference for the longest repeats in a text, against a search of the whole text."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from kernels.session_options import MAX_REPEATS as MAX_PLACES
from tests.reference.text_matches import MAX_LENGTH, MIN_LENGTH, TextMatches, match_continuations

tokens = st.lists(st.integers(0, 3), max_size=60)


def longest_repeats(text: list[int], after: list[int]) -> dict[int, int]:
    """By definition: of every earlier place, how many tokens before it are the last ones of text and ``after``."""
    whole, found = text + after, dict[int, int]()
    places = [place for place in range(2, len(text)) if text[place - 2 : place] == whole[-2:]]
    for place in places[-MAX_PLACES:]:
        length = max(n for n in range(MIN_LENGTH, min(place, MAX_LENGTH) + 1) if text[place - n : place] == whole[-n:])
        found[text[place]] = max(found.get(text[place], 0), length)
    return found


@given(pieces=st.lists(tokens, max_size=4), after=st.lists(st.integers(0, 3), max_size=20))
def test_finds_the_longest_repeats(pieces: list[list[int]], after: list[int]) -> None:
    text = TextMatches()
    for piece in pieces:
        text.extend(piece)
    assert len(text) == sum(map(len, pieces))
    assert text.find(after) == longest_repeats([*chain.from_iterable(pieces)], after)


@given(tokens=st.lists(st.integers(0, 2), max_size=80))
def test_the_longest_repeat_is_the_latest_of_those(tokens: list[int]) -> None:
    text = TextMatches()
    text.extend(tokens)
    place, length = text.longest()
    found = longest_repeats(tokens, [])
    if not found:
        assert (place, length) == (-1, 0)
        return
    assert length == max(found.values()) == found[tokens[place]]
    agree = [p for p in range(length, len(tokens)) if tokens[p - length : p] == tokens[len(tokens) - length :]]
    assert place == agree[-1]


def test_values_grow_with_the_length_of_the_repeat() -> None:
    text, empty = TextMatches(), TextMatches()
    text.extend([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3])
    continuations = match_continuations([text, empty, text], [[], [5], [7, 9]])
    values = continuations.at(continuations.token_ids)
    rows = [dict(zip(*row, strict=True)) for row in zip(continuations.token_ids.tolist(), values.tolist(), strict=True)]
    assert rows[0][7] > rows[0][8] > 0
    assert rows[2][2] > rows[0][7]
    assert set(rows[1]) == {-1}
    assert not values[1].any()
