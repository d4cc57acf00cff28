"""What followed the longest repeats of a sequence's last tokens, in its own prompt and answer.

Counts of triples forget how long a repeat is. A text that is being copied agrees with its source over many tokens, and
the longer it has, the surer it goes on. As prompt lookup does, but as one more voice in the prior, not in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from kernels.session_options import MAX_REPEATS as MAX_PLACES
from tests.reference.continuations import Continuations

MIN_LENGTH, MAX_LENGTH = 2, 16
"""Tokens that must agree before a place counts, and from how many on it makes no difference."""
_ID_BITS = 31


class TextMatches:
    """An index of one sequence's text by pairs of tokens: chains of the places where each pair ends."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._latest: dict[int, int] = {}
        """Pair → the last place right after it."""
        self._previous: list[int] = []
        """For each place, the one before it in its chain; -1 for none."""

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append to the text."""
        for token_id in token_ids:
            place, key = len(self._tokens), self._key(self._tokens[-2:])
            self._previous.append(self._latest.get(key, -1))
            if key >= 0:
                self._latest[key] = place
            self._tokens.append(token_id)

    def find(self, after: Sequence[int] = ()) -> dict[int, int]:
        """Tokens that followed a repeat of the text's end, with the length of the longest such repeat.

        Args:
            after: tokens that the text is taken to go on with, such as drafts.
        """
        found = dict[int, int]()
        for place, length in self._repeats([*self._tokens[-MAX_LENGTH:], *after][-MAX_LENGTH:]):
            token_id = self._tokens[place]
            found[token_id] = max(found.get(token_id, 0), length)
        return found

    def longest(self) -> tuple[int, int]:
        """The place right after the longest repeat of the text's end, of equals the latest, and its length.

        (-1, 0) where nothing repeats.
        """
        return max(self._repeats(self._tokens[-MAX_LENGTH:]), key=itemgetter(1), default=(-1, 0))

    def _repeats(self, end: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The places after which ``end`` may go on as before, the latest first, and how many tokens agree there."""
        tokens = self._tokens
        place = self._latest.get(self._key(end[-2:]), -1)
        for _ in range(MAX_PLACES):
            if place < 0:
                return
            length, most = MIN_LENGTH, min(len(end), place)
            while length < most and tokens[place - length - 1] == end[-length - 1]:
                length += 1
            yield place, length
            place = self._previous[place]

    def _key(self, pair: Sequence[int]) -> int:
        """-1 where there are no two tokens."""
        return pair[0] << _ID_BITS | pair[1] if len(pair) == MIN_LENGTH else -1


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
