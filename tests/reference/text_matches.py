"""What followed the longest repeats of a sequence's last tokens, in its own prompt and answer.

Counts of triples forget how long a repeat is. A text that is being copied agrees with its source over many tokens, and
the longer it has, the surer it goes on. As prompt lookup does, but as one more voice in the prior, not in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.session_options import MAX_REPEATS as MAX_PLACES
from tests.reference.continuations import Continuations

MIN_LENGTH, MAX_LENGTH = 2, 16
"""Tokens that must agree before a place counts, and from how many on it makes no difference."""


class TextMatches:
    """One sequence's text, searched from its end to its beginning."""

    def __init__(self) -> None:
        self._tokens: list[int] = []

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        self._tokens += token_ids

    def find(self, after: Sequence[int] = ()) -> dict[int, int]:
        """Tokens that followed a repeat of the text's end, with the length of the longest such repeat.

        Args:
            after: tokens that the text is taken to go on with, such as drafts.
        """
        found = dict[int, int]()
        for place, length in self._repeats([*self._tokens, *after]):
            token_id = self._tokens[place]
            found[token_id] = max(found.get(token_id, 0), length)
        return found

    def longest(self) -> tuple[int, int]:
        """The place right after the longest repeat of the text's end, of equals the latest, and its length.

        (-1, 0) where nothing repeats.
        """
        return max(self._repeats(self._tokens), key=itemgetter(1), default=(-1, 0))

    def _repeats(self, whole: Sequence[int]) -> list[tuple[int, int]]:
        """The latest places after which ``whole`` may go on as before, and how many tokens agree there."""
        tokens = self._tokens
        places = [p for p in range(MIN_LENGTH, len(tokens)) if tokens[p - MIN_LENGTH : p] == [*whole[-MIN_LENGTH:]]]
        return [(p, self._agreement(p, whole)) for p in places[: -MAX_PLACES - 1 : -1]]

    def _agreement(self, place: int, whole: Sequence[int]) -> int:
        lengths = range(MIN_LENGTH, min(place, MAX_LENGTH) + 1)
        return max(n for n in lengths if self._tokens[place - n : place] == [*whole[-n:]])


def copied(token_ids: Sequence[int], place: int, count: int) -> list[int]:
    """``count`` tokens from a place on; where the text ends, it goes on with what was copied."""
    return list(islice(cycle(token_ids[place : place + count]), count))


def match_continuations(texts: Sequence[TextMatches], drafts: Sequence[Sequence[int]]) -> Continuations:
    """What ``find`` gives for each of B rows; values are log(length of the repeat).

    Args:
        texts: one a row.
        drafts: what each is taken to go on with.
    """
    token_ids: NDArray[np.int32] = np.full((len(texts), MAX_PLACES), -1, np.int32)
    lengths: NDArray[np.float32] = np.ones((len(texts), MAX_PLACES), np.float32)
    for row, (text, after) in enumerate(zip(texts, drafts, strict=True)):
        found = text.find(after)
        token_ids[row, : len(found)] = list(found)
        lengths[row, : len(found)] = list(found.values())
    return Continuations(token_ids, np.log(lengths))
