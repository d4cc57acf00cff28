"""How many tokens of which sequences to draft or verify, given how likely each is to be accepted and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat, takewhile
from operator import mul

from evospec.engine.speculation.length.costs import Costs, Seconds

_MIN_GAIN = 1.03
"""Drafting must promise this many times the rate without it: costs are estimates."""
_HOPELESS = 0.05
"""A draft less likely than this to be accepted is worth no thought."""
_DRAFTS_A_READING = 32
"""A sequence's text is read for about so many drafts; more where answers are long."""

_Draft = tuple[float, int, int]
"""Of a token that may be drafted: the chance that it is accepted, its place, and its sequence."""


@dataclass(frozen=True)
class Plan:
    """Draft lengths, one a sequence, and the tokens a second that they promise."""

    lengths: list[int]
    rate: float


def best_plan(costs: Costs, chances: Sequence[Sequence[float]]) -> Plan:
    """Draft lengths that maximise expected tokens / seconds of one step.

    Args:
        costs: of the step's parts.
        chances: for each sequence, by place: the chance that drafts up to there are all accepted; falling.

    Returns:
        All lengths 0 unless drafting gains at least ``_MIN_GAIN``.
    """
    ranked, without = _ranked(chances), len(chances) / costs.verify(len(chances))
    seconds = _cumulative_seconds(costs, [place for _, place, _ in ranked])
    count, rate = _best_count(costs.verify, len(chances), ranked, seconds, _MIN_GAIN * without)
    return Plan(_lengths(ranked[:count], len(chances)), rate if count else without)


def worth_reading(costs: Costs, num_sequences: int, chances: Sequence[float], num_unread: int) -> bool:
    """Whether a sequence's drafts promise more than they cost, and more than it takes to read its text for them.

    Args:
        costs: of the step's parts.
        num_sequences: of the step, all of which are taken to be drafted for.
        chances: as for ``best_plan``, of this sequence.
        num_unread: tokens that have to be read first.
    """
    if num_unread == 0:
        return True
    rate = num_sequences / costs.verify(num_sequences)
    drafting = costs.first_draft(num_sequences) / num_sequences, costs.next_draft(num_sequences) / num_sequences
    seconds = num_unread * costs.read / _DRAFTS_A_READING
    worth, verified = -rate * seconds, costs.verify(num_sequences)
    for place, chance in enumerate(chances):
        more = costs.verify(num_sequences + place + 1)
        worth += chance - rate * (more - verified + drafting[place > 0])
        verified = more
        if worth > 0.0:
            return True
    return False


def best_verified(verify: Seconds, chances: Sequence[Sequence[float]], draft_seconds: float) -> list[int]:
    """How many drafts of each sequence to verify for the most tokens a second, drafting having taken its time.

    ``verify``: seconds by tokens. ``chances``: as for ``best_plan``.
    """
    ranked, without = _ranked(chances), len(chances) / (verify(len(chances)) + draft_seconds)
    count, _ = _best_count(verify, len(chances), ranked, repeat(draft_seconds), without)
    return _lengths(ranked[:count], len(chances))


def _best_count(
    verify: Seconds, num_sequences: int, ranked: Sequence[_Draft], draft_seconds: Iterable[float], least_rate: float
) -> tuple[int, float]:
    """How many of the ranked drafts give the best rate, and that rate; 0 where none is above ``least_rate``.

    ``draft_seconds``: with the first of them, the first two, ...
    """
    expected, best = float(num_sequences), (0, least_rate)
    for count, ((chance, _, _), seconds) in enumerate(zip(ranked, draft_seconds, strict=False), start=1):
        expected += chance
        rate = expected / (verify(num_sequences + count) + seconds)
        if rate > best[1]:
            best = count, rate
    return best


def _cumulative_seconds(costs: Costs, places: Sequence[int]) -> Iterator[float]:
    """What drafting the first, the first two, ... of some tokens takes, given the place of each."""
    drafting, seconds = [0] * (max(places, default=0) + 1), 0.0  # sequences that draft at each place
    for place in places:
        curve = costs.next_draft if place else costs.first_draft
        before = curve(drafting[place]) if drafting[place] else 0.0
        drafting[place] += 1
        seconds += curve(drafting[place]) - before
        yield seconds


def all_before(acceptance: Sequence[float]) -> list[float]:
    """Chance that the first, second, ... draft is accepted together with all before it, as far as that is likely."""
    return list(takewhile(lambda chance: chance > _HOPELESS, accumulate(acceptance, mul)))


def _ranked(chances: Sequence[Sequence[float]]) -> list[_Draft]:
    """Chance, place and sequence of each draft token, the likeliest first, and none before one it depends on."""
    drafts = ((chance, place, index) for index, row in enumerate(chances) for place, chance in enumerate(row))
    return sorted(drafts, key=lambda draft: (-draft[0], draft[1]))


def _lengths(drafts: Sequence[_Draft], num_sequences: int) -> list[int]:
    lengths = [0] * num_sequences
    for _, place, index in drafts:
        lengths[index] = max(lengths[index], place + 1)
    return lengths
