"""The model of many replicas (``benchmarks.fleet.simulation``): what must hold whatever its costs are."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.fleet.simulation.figures import figures, interval_of
from benchmarks.fleet.simulation.fleet import Fleet, Served
from benchmarks.fleet.simulation.machine import Machine
from benchmarks.fleet.simulation.replica import Costs
from benchmarks.fleet.simulation.ring import Anywhere, Ring, Router, hashes_each, shares, with_room
from benchmarks.fleet.simulation.traces import Conversation, Scale, Turn, make_conversations

COSTS = Costs(
    verify={"1": 6.0, "8": 13.0, "64": 70.0},
    first_draft={"1": 0.6, "8": 3.0},
    next_draft={"1": 0.4, "8": 1.5},
    read=0.02,
)
SCALE = Scale(pause=10.0)


def run(router: Router, hosts: int, conversations: list[Conversation], cores: float = 2.0) -> list[Served]:
    return Fleet(COSTS, 700, router, [0] * hosts, cores, SCALE, {}).run(conversations, ["a", "b"])


def test_every_turn_is_served_once_and_in_order() -> None:
    conversations = make_conversations(0.5, 60.0, SCALE)
    served = run(Ring(["127.0.0.1:1", "127.0.0.1:2"]), 2, conversations)
    turns = {(one.session, one.turn) for one in served}
    assert len(turns) == len(served) == sum(len(one.turns) for one in conversations)
    for one in served:
        assert one.start < one.first_token <= one.end
        assert 1 <= one.events <= one.output_tokens
    assert served == run(Ring(["127.0.0.1:1", "127.0.0.1:2"]), 2, conversations)


def test_one_session_at_one_replica_finds_all_that_it_said() -> None:
    turns = [Turn(1.0, 100, 20) for _ in range(4)]
    served = run(Ring(["127.0.0.1:1"]), 1, [Conversation(0, 0.0, turns)])
    assert [one.stayed for one in served] == [False, True, True, True]
    for before, one in pairwise(served):
        in_cache = before.prompt_tokens + before.output_tokens - 1  # the last token is computed by the turn after it
        assert one.cached_tokens == in_cache // 16 * 16


def test_without_affinity_a_session_often_finds_nothing() -> None:
    conversations = make_conversations(0.5, 60.0, SCALE)
    at_home, anywhere = (
        figures(run(router, 8, conversations, cores=16.0))
        for router in (Ring([f"127.0.0.1:{port}" for port in range(8)]), Anywhere(8))
    )
    assert at_home["stayed"] > 0.9 > 0.5 > anywhere["stayed"]
    assert at_home["prefix_hits"] > anywhere["prefix_hits"]


def test_intervals_hold_what_was_found_and_are_points_where_all_conversations_are_alike() -> None:
    conversations = make_conversations(0.5, 60.0, SCALE)
    served = run(Ring(["127.0.0.1:1", "127.0.0.1:2"]), 2, conversations)
    found = interval_of(served, "first_token_p50")
    assert found[0] < figures(served)["first_token_p50"] < found[1]
    alike = [replace(served[0], session=str(number)) for number in range(5)]
    assert interval_of(alike, "answer_p90") == (figures(alike)["answer_p90"],) * 2


def next_end(machine: Machine) -> tuple[float, Hashable, bool]:
    found = machine.next_end()
    assert found is not None
    return round(found[0], 9), *found[1:]


def test_cores_are_shared_equally() -> None:
    machine = Machine(1.0)
    machine.start(0.0, "engine 1", 1.0, is_engine=True)
    machine.start(0.0, "engine 2", 1.5, is_engine=True)
    assert next_end(machine) == (2.0, "engine 1", True)
    machine.start(0.5, "request", 0.1, is_engine=False)
    assert next_end(machine) == (0.8, "request", False)
    machine.end(0.8, "request", is_engine=False)
    assert next_end(machine) == (2.1, "engine 1", True)
    machine.end(2.1, "engine 1", is_engine=True)
    assert next_end(machine) == (2.6, "engine 2", True)
    assert machine.busy == {True: pytest.approx(2.0), False: pytest.approx(0.1)}
    alone = Machine(2.0)
    alone.start(0.0, "engine", 1.0, is_engine=True)
    assert next_end(alone) == (1.0, "engine", True), "a thread has one core at most"


def test_a_replica_above_its_bound_hands_on_always_to_the_same() -> None:
    active = [3, 0, 0, 0]
    found = {with_room(0, "session", active) for _ in range(10)}
    assert len(found) == 1
    assert 0 not in found
    assert with_room(1, "session", active) == 1


def test_few_places_on_the_ring_make_unequal_shares() -> None:
    assert [hashes_each(count, 1024) for count in (4, 10, 1000, 100_000)] == [256, 103, 2, 1]
    few, many = shares(1000, 1024), shares(1000, 100_000)
    assert sum(few) == pytest.approx(1000)
    assert few[-1] > 3.0 > 1.5 > many[-1]
