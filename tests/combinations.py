"""Values of several parameters together: every pair of values by default, every combination on demand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

EVERY = "EVOSPEC_TEST_EVERY_COMBINATION"
"""Environment variable that asks for all of them: ``make test-every``."""


def pairwise(*, indirect: Sequence[str] = (), **values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by names and their values, so that any two values of two parameters meet at least once.

    ``indirect``: names of fixtures, which get their values as ``request.param``.
    """
    rows = list(product(*values.values()))
    rows = rows if os.environ.get(EVERY) else _covering(rows)
    return pytest.mark.parametrize(",".join(values), rows, indirect=indirect)


def _covering(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Few of some combinations that have all their pairs: always the next one that has most of those still missing."""
    missing = set().union(*map(_pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(_pairs(row) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(row: tuple[Any, ...]) -> set[tuple[tuple[int, Any], ...]]:
    return set(combinations(enumerate(row), 2))
