"""What the servers of one key tell each other; over a real Valkey it is in integration/test_shared_adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from evospec.adapters.alignment.exchange import exchange
from evospec.adapters.alignment.shared_versions import SharedKey, SharedVersion


class Shared:
    """What other servers have agreed on."""

    def __init__(self, **found: Any) -> None:
        self._found = SharedKey(**({"number": 0, "num_resets": 0, "is_frozen": None} | found))
        self.published: list[Any] = []

    def leads(self, key: str) -> bool:
        return True

    def look(self, key: str) -> SharedKey:
        return self._found

    def version(self, key: str) -> SharedVersion:
        return SharedVersion(self._found.number, {})

    def publish(self, key: str, tensors: Any) -> int:
        self.published.append(tensors)
        return self._found.number + 1


def make_aligner(**values: Any) -> Any:
    state = {"key": "t", "is_frozen": False, "learns_after": 0.0, "num_resets": 0, "own_number": 0, "bad_number": 0}
    given = {"wants_work": False, "wants_answers": False, "unshared": set[str](), "shared_number": 0, "tensors": None}
    of_state = {name: value for name, value in values.items() if name in state}
    rest = {name: value for name, value in values.items() if name not in state}
    return SimpleNamespace(state=SimpleNamespace(**state | of_state), save=lambda: None, **given | rest)


def agree(aligner: Any, shared: Any) -> None:
    exchange(aligner, shared, lambda: 7.0)


def test_a_server_leads_while_it_has_work_or_lets_answers_be_written() -> None:
    for wants_work, wants_answers in ((False, False), (True, False), (False, True)):
        aligner = make_aligner(wants_work=wants_work, wants_answers=wants_answers)
        agree(aligner, Shared())
        assert aligner.leads == (wants_work or wants_answers)


def test_what_was_logged_before_another_server_ended_a_freeze_is_not_learned_from() -> None:
    aligner = make_aligner(is_frozen=True)
    agree(aligner, Shared(is_frozen=False))
    assert (aligner.state.is_frozen, aligner.state.learns_after) == (False, 7.0)


def test_a_version_taken_back_right_before_the_worker_was_killed_is_withdrawn_by_the_next() -> None:
    aligner, shared = make_aligner(own_number=3, bad_number=3), Shared(number=3)
    agree(aligner, shared)
    assert aligner.unshared == {"version"}
    agree(aligner, shared)
    assert shared.published == [None]
    assert aligner.state.own_number == 4


def test_a_version_that_the_disk_has_no_room_for_is_followed_when_there_is() -> None:
    followed, disk = [], ["full", "free"]

    def follow(tensors: Any, is_own: bool) -> None:
        if disk.pop(0) == "full":
            raise OSError(28, "No space left on device")
        followed.append(tensors)

    aligner, shared = make_aligner(follow=follow), Shared(number=3)
    with pytest.raises(OSError, match="space"):
        agree(aligner, shared)
    agree(aligner, shared)
    agree(aligner, shared)
    assert followed == [{}]
    assert aligner.is_unsaved
