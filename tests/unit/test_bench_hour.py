"""The ratios of ``benchmarks.hour``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.hour import FIXED, LEARNING, burst_speed, ratios


def answer(tokens: int, accepted: int, seconds: float) -> dict[str, Any]:
    return {"tokens": tokens, "accepted": accepted, "seconds": seconds}


def test_ratios_are_of_sums_and_their_intervals_of_prompts() -> None:
    """Two tokens a verification become four on one prompt of two, and 100 tokens a second 200."""
    same = {LEARNING: answer(100, 50, 1.0), FIXED: answer(100, 50, 1.0)}
    better = {LEARNING: answer(100, 75, 0.5), FIXED: answer(100, 50, 1.0)}
    found = ratios([same, better])
    assert found["length"] == pytest.approx((200 / 75 / 2, 1.0, 2.0))
    assert found["speed"] == pytest.approx((200 / 1.5 / 100, 1.0, 2.0))
    assert ratios([same, same]) == {"length": (1.0, 1.0, 1.0), "speed": (1.0, 1.0, 1.0)}


def test_bursts_count_by_their_time() -> None:
    bursts = [{LEARNING: answer(100, 0, 1.0), FIXED: answer(100, 0, 1.0)}] * 2
    slow = {LEARNING: answer(100, 0, 4.0), FIXED: answer(100, 0, 1.0)}
    assert burst_speed(bursts) == 1.0
    assert burst_speed([*bursts, slow]) == 0.5
