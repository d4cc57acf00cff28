"""The arithmetic of ``benchmarks.trees``: shapes of drafts from how often each choice of a draft is right."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.common.draft_traces import DEPTH, Trace
from benchmarks.trees import best_trees, chains, fastest, rank_shares
from engine.spec.step_costs import Curve, StepCosts


def trace(answer: list[int], choices: list[list[list[int]]]) -> Trace:
    """``choices[row][depth]``: the draft's choices, the likeliest first."""
    ids = np.array(choices, np.int32)
    return Trace("code", [1], answer, ids, np.zeros(ids.shape, np.float16), np.zeros((0, 10), np.int32))


def costs(of_a_token: float) -> StepCosts:
    verify = Curve([(1, 1.0), (2, 1.0 + of_a_token), (3, 1.0 + 2 * of_a_token)])
    return StepCosts(verify=verify, first_draft=Curve([(1, 0.01)]), next_draft=Curve([(1, 0.01)]))


def test_a_place_counts_only_where_all_before_it_were_right() -> None:
    right, second, wrong = [7, 0, 0, 0], [0, 7, 0, 0], [0, 0, 0, 0]
    answer = [7] * (DEPTH + 2)
    shares = rank_shares([trace(answer, [[right, second, right, right], [wrong, right, right, right]])])
    assert shares[0].tolist() == [0.5, 0, 0, 0]
    assert shares[1].tolist() == [0, 1, 0, 0]  # of the one row that got there


def test_trees_hold_the_likeliest_tokens() -> None:
    shares = np.array([[0.5, 0.3, 0.1, 0.0], [0.4, 0.1, 0.0, 0.0], [0.2, 0, 0, 0], [0.2, 0, 0, 0]])
    trees, line = best_trees(shares), chains(shares)
    assert trees[1].accepted == line[1].accepted == 0.5
    assert trees[2].accepted == pytest.approx(0.8)  # the second choice, 0.3, before 0.5 * 0.4
    assert (trees[2].depth, line[2].depth) == (1, 2)
    assert line[2].accepted == pytest.approx(0.7)
    assert all(later.accepted >= one.accepted for one, later in pairwise(trees))


def test_dear_tokens_make_small_shapes() -> None:
    shares = np.full((DEPTH, 4), 0.4)
    assert fastest(chains(shares), costs(of_a_token=0.0)).nodes == DEPTH
    assert fastest(chains(shares), costs(of_a_token=0.6)).nodes == 0
