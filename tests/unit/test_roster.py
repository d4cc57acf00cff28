"""Who leaves when there are more adapter keys than slots."""

from __future__ import annotations

from typing import cast

from structlog.testing import capture_logs

from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.intake import Roster


def make_roster(num_slots: int) -> tuple[Roster, list[str]]:
    """A roster whose aligners do nothing, and who has left it."""
    left: list[str] = []
    return Roster(num_slots, lambda _: cast(KeyAligner, object()), lambda key, _: left.append(key)), left


def test_only_a_key_that_was_silent_for_a_minute_leaves() -> None:
    roster, left = make_roster(2)
    roster.hear("first", 0.0)
    roster.hear("second", 30.0)
    assert roster.hear("third", 59.0) is None
    assert roster.hear("third", 61.0) is not None
    assert left == ["first"]
    assert roster.hear("first", 62.0) is None


def test_a_key_whose_leave_fails_stays() -> None:
    """The disk is full: what it has in force is watched on, and the newcomer has no slot, which is logged once."""

    def fail(key: str, _: KeyAligner) -> None:
        raise OSError(28, "No space left on device")

    roster = Roster(1, lambda _: cast(KeyAligner, object()), fail)
    first = roster.hear("first", 0.0)
    with capture_logs() as logs:
        for at in (61.0, 62.0):
            assert roster.hear("second", at) is None
    [warning] = logs
    assert "No space left" in warning["reason"]
    assert roster.hear("first", 63.0) is first


def test_records_told_twice_do_not_make_a_key_silent() -> None:
    """A batch that was not acknowledged is read again, after newer ones were."""
    roster, left = make_roster(1)
    for at in (0.0, 100.0, 1.0):
        roster.hear("busy", at)
    assert roster.hear("newcomer", 120.0) is None
    assert left == []
