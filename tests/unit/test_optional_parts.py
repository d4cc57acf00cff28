"""Parts that may fail: what is counted, when one is switched off, and when it is tried again."""

from __future__ import annotations

import pytest

from evospec.engine.optional_parts import FIRST_PAUSE, LONGEST_PAUSE, MOST_FAULTS, OptionalParts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def parts(clock: Clock) -> OptionalParts:
    return OptionalParts(clock)


def fail() -> str:
    raise RuntimeError("injected")


def test_what_works_is_passed_on_and_what_fails_is_replaced(parts: OptionalParts) -> None:
    assert parts.call("a", "otherwise", str.upper, "result") == "RESULT"
    assert parts.call("a", "otherwise", fail) == "otherwise"
    assert parts.faults == {"a": 1}
    assert parts.switched_off == []


def test_a_part_is_switched_off_alone(parts: OptionalParts) -> None:
    for _ in range(MOST_FAULTS):
        parts.call("a", "", fail)
    assert parts.switched_off == ["a"]
    assert parts.call("a", "otherwise", lambda: "works") == "otherwise"
    assert parts.call("b", "otherwise", lambda: "works") == "works"


def test_each_pause_is_twice_as_long_up_to_the_longest(parts: OptionalParts, clock: Clock) -> None:
    for _ in range(MOST_FAULTS - 1):
        parts.call("a", "", fail)
    pause = FIRST_PAUSE
    for _ in range(10):
        parts.call("a", "", fail)  # one is enough, where it has been switched off before
        clock.now += pause - 1
        assert parts.is_off("a")
        clock.now += 1
        assert not parts.is_off("a")
        pause = min(2 * pause, LONGEST_PAUSE)


def test_long_work_makes_up_for_faults(parts: OptionalParts, clock: Clock) -> None:
    for _ in range(3 * MOST_FAULTS):
        parts.call("a", "", fail)
        clock.now += 601
        assert not parts.is_off("a")
    assert parts.faults == {"a": 3 * MOST_FAULTS}


def test_what_a_part_holds_is_given_back_also_while_it_is_switched_off(parts: OptionalParts) -> None:
    given_back = list[str]()
    for _ in range(MOST_FAULTS):
        parts.clean_up("a", fail)
    parts.clean_up("a", given_back.append, "slot")
    assert given_back == ["slot"]
    assert parts.switched_off == ["a"]
