"""No tenant can keep another from its share of places, blocks and steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.admission import TURN_TOKENS, RunningSequences
from evospec.engine.kv_cache_manager import KVCacheManager
from evospec.engine.request import Request
from tests.unit.scheduler_simulation import BLOCK_SIZE, Simulation, expected_output, make_request


def add(
    simulation: Simulation, tenant: str, count: int = 1, num_prompt: int = 4, max_tokens: int = 4, name: str = ""
) -> list[Request]:
    """Add requests whose prompts share no block."""
    requests = []
    for n in range(count):
        prompt = [n % 5, n // 5, *[ord(tenant)] * num_prompt][:num_prompt]
        requests.append(make_request(f"{tenant}{name}{n}", 0, max_tokens, tenant, token_ids=prompt))
        simulation.scheduler.add(requests[-1])
    return requests


def steps_to_first_token(simulation: Simulation, request: Request, most: int) -> int:
    for step in range(1, most + 1):
        simulation.step()
        if request.output_token_ids:
            return step
    raise AssertionError(f"no token in {most} steps")


def test_a_tenant_that_has_all_places_gives_one_up_at_once() -> None:
    simulation = Simulation(max_num_seqs=8, num_blocks=200)
    hog = add(simulation, "h", count=40, max_tokens=200)
    for _ in range(10):
        simulation.step()
    (newcomer,) = add(simulation, "n")
    assert steps_to_first_token(simulation, newcomer, most=1) == 1
    assert [request.num_preemptions for request in hog[:8]] == [0] * 7 + [1]


def test_a_tenant_that_has_all_blocks_gives_some_up_at_once() -> None:
    simulation = Simulation(max_num_seqs=16, num_blocks=30, max_batched_tokens=64)
    add(simulation, "h", count=48, max_tokens=200)
    for _ in range(60):
        simulation.step()
    for n in range(5):
        (newcomer,) = add(simulation, "n", num_prompt=40, name=f"-{n}-")
        assert steps_to_first_token(simulation, newcomer, most=2) <= 2
        while newcomer not in simulation.finished:
            simulation.step()


def test_a_tenant_gets_its_share_and_no_more() -> None:
    simulation = Simulation(max_num_seqs=8, num_blocks=200)
    add(simulation, "h", count=40, max_tokens=200)
    simulation.step()
    add(simulation, "n", count=40, max_tokens=200)
    for _ in range(20):
        running = [sequence.request.tenant for sequence in simulation.step().sequences]
    assert (running.count("h"), running.count("n")) == (4, 4)
    assert simulation.scheduler.stats().preemptions == 4


def test_the_choices_of_a_request_count_each() -> None:
    """As n = 16 makes them: they share their prompt's blocks, but each has a place."""
    simulation = Simulation(max_num_seqs=8, num_blocks=200, max_batched_tokens=256)
    for n in range(16):
        simulation.scheduler.add(make_request(str(n), 40, max_tokens=100))
    simulation.step()
    newcomers = add(simulation, "n", count=4)
    for _ in range(4):
        simulation.step()
    assert all(request.output_token_ids for request in newcomers)


def test_blocks_that_a_tenants_sequences_share_count_once() -> None:
    """Four shared blocks, and for each sequence one of its own and one to grow into."""
    kv = KVCacheManager(24, BLOCK_SIZE, prefix_caching=True)
    running = RunningSequences(kv, max_sequences=20)
    choices = [make_request(f"n{n}", 4 * BLOCK_SIZE + 1) for n in range(5)]
    for request in choices[:4]:
        assert running.is_entitled(request, num_tenants=2)
        assert kv.allocate(request, request.num_tokens, cached=kv.cached_blocks(request))
        request.num_computed_tokens = request.num_tokens
        kv.after_commit(request)
        running.append(request)
    assert not running.is_entitled(choices[4], num_tenants=2)


def test_the_only_sequence_above_its_share_keeps_its_blocks_for_a_turn() -> None:
    simulation = Simulation(num_blocks=8, max_batched_tokens=200)
    (large,) = add(simulation, "h", num_prompt=60, max_tokens=66)
    simulation.step()
    (newcomer,) = add(simulation, "n", num_prompt=60)
    assert steps_to_first_token(simulation, newcomer, most=TURN_TOKENS + 1) == TURN_TOKENS
    assert len(large.output_token_ids) == TURN_TOKENS
    simulation.run(max_steps=100)
    assert simulation.finished == [newcomer, large]


def test_sequences_that_do_not_fit_side_by_side_take_turns() -> None:
    simulation = Simulation(num_blocks=8, max_batched_tokens=200, max_model_len=128)
    (first,) = add(simulation, "a", num_prompt=10, max_tokens=110)
    simulation.run_until(lambda: len(first.output_token_ids) == 60)
    (second,) = add(simulation, "b", num_prompt=70, max_tokens=50)
    simulation.run(max_steps=300)
    assert first.num_preemptions > 0 < second.num_preemptions
    assert first.num_preemptions + second.num_preemptions <= 160 // TURN_TOKENS + 1


def test_a_request_above_its_share_need_not_wait_for_the_end_of_sequences_within_theirs() -> None:
    simulation = Simulation(num_blocks=20, max_batched_tokens=512, max_model_len=500)
    (small,) = add(simulation, "h", max_tokens=250)
    simulation.step()
    (large,) = add(simulation, "n", num_prompt=300)
    assert steps_to_first_token(simulation, large, most=100) == TURN_TOKENS
    simulation.run(max_steps=300)
    assert simulation.finished == [large, small]


def test_a_request_above_its_share_is_not_passed_for_ever() -> None:
    simulation = Simulation(num_blocks=20, max_batched_tokens=512, max_model_len=500)
    large = make_request("large", 290, tenant="n")
    for step in range(20 + TURN_TOKENS):
        add(simulation, "h", count=3, max_tokens=10, name=f"-{step}-")
        if step == 20:
            simulation.scheduler.add(large)
        simulation.step()
    assert large.output_token_ids


@pytest.mark.parametrize("places", [16, 8])
def test_a_request_that_waits_for_its_own_tenants_blocks_is_passed_within_shares_only(places: int) -> None:
    """Its tenant has had less service, but what it asks for now is too much beside what it has; the other has four."""
    simulation = Simulation(num_blocks=60, max_num_seqs=places, max_batched_tokens=512, max_model_len=500)
    add(simulation, "h", num_prompt=320, max_tokens=1, name="cached")
    simulation.run(max_steps=1)
    add(simulation, "n", count=4, num_prompt=80, max_tokens=200)
    simulation.step()
    first, second = add(simulation, "h", count=2, num_prompt=320, max_tokens=150)
    for _ in range(10):
        simulation.step()
    (newcomer,) = add(simulation, "n", name="late")
    for _ in range(2):
        simulation.step()
    assert first.output_token_ids
    assert not second.output_token_ids
    assert bool(newcomer.output_token_ids) == (places == 16)


def test_a_stalled_sequence_has_no_turn() -> None:
    simulation = Simulation(num_blocks=8, max_batched_tokens=200)
    (large,) = add(simulation, "h", num_prompt=60, max_tokens=60)
    simulation.step()
    large.is_stalled = True
    (newcomer,) = add(simulation, "n", num_prompt=60)
    assert steps_to_first_token(simulation, newcomer, most=1) == 1
    large.is_stalled = False
    simulation.run(max_steps=200)
    assert simulation.finished == [newcomer, large]


def test_whoever_holds_most_blocks_gives_way_to_a_sequence_that_grows() -> None:
    """Not the one admitted last."""
    simulation = Simulation(num_blocks=9, max_batched_tokens=200)
    hog = add(simulation, "h", count=3, num_prompt=20, max_tokens=60)
    simulation.step()
    (small,) = add(simulation, "n", num_prompt=4, max_tokens=60)
    simulation.run(max_steps=300)
    assert small.num_preemptions == 0 < hog[2].num_preemptions


def test_a_preempted_sequence_waits_behind_tenants_with_less_service() -> None:
    simulation = Simulation(max_num_seqs=2, num_blocks=100)
    add(simulation, "h", count=2, max_tokens=60)
    for _ in range(10):
        simulation.step()
    light = add(simulation, "n", count=4, max_tokens=2)
    while simulation.scheduler.stats().waiting_by_tenant.get("n"):
        simulation.step()
    simulation.run(max_steps=200)
    assert simulation.finished[: len(light)] == light


def test_a_tenant_that_was_idle_owes_nothing_from_before() -> None:
    simulation = Simulation(max_num_seqs=4, num_blocks=100)
    add(simulation, "h", count=8, max_tokens=100)
    simulation.step()
    before = add(simulation, "n", count=30, num_prompt=30, max_tokens=1)
    simulation.run_until(lambda: set(before) <= set(simulation.finished))
    (again,) = add(simulation, "n", name="again")
    assert steps_to_first_token(simulation, again, most=2) <= 2


def test_a_long_prompt_does_not_keep_another_tenants_from_starting() -> None:
    simulation = Simulation(max_batched_tokens=32, num_blocks=200, max_model_len=2000)
    first, behind = add(simulation, "h", count=2, num_prompt=1000, max_tokens=1)
    simulation.step()
    (second,) = add(simulation, "n", num_prompt=200, max_tokens=1)
    assert steps_to_first_token(simulation, second, most=13) == 13  # with half of each step
    assert 200 <= first.num_computed_tokens < 1000
    assert behind.num_computed_tokens == 0
    simulation.run(max_steps=100)


@dataclass(frozen=True)
class Load:
    """What a tenant sends: ``count`` requests at ``step``."""

    step: int
    tenant: str
    count: int
    num_prompt: int
    max_tokens: int
    aborted_after: int | None


loads = st.builds(
    Load,
    step=st.integers(0, 60),
    tenant=st.sampled_from("abcd"),
    count=st.integers(1, 12),
    num_prompt=st.integers(1, 100),
    max_tokens=st.integers(1, 100),
    aborted_after=st.none() | st.none() | st.integers(0, 40),
)


@settings(max_examples=35, deadline=None)
@given(
    loads=st.lists(loads, min_size=2, max_size=8),
    num_blocks=st.integers(13, 40),
    max_num_seqs=st.integers(4, 12),
    max_batched_tokens=st.integers(16, 64),
    prefix_caching=st.booleans(),
    num_drafts=st.sampled_from([0, 0, 3, 20]),
    stalling=st.sampled_from([0.0, 0.0, 0.1]),
)
def test_newcomers_wait_for_a_bounded_number_of_steps_and_every_request_finishes(
    loads: list[Load],
    num_blocks: int,
    max_num_seqs: int,
    max_batched_tokens: int,
    prefix_caching: bool,
    num_drafts: int,
    stalling: float,
) -> None:
    """The bound that ``Admission`` states, where nothing is stalled."""
    simulation = Simulation(
        num_blocks,
        max_num_seqs,
        max_batched_tokens,
        prefix_caching=prefix_caching,
        num_drafts=num_drafts,
        stalling=stalling,
    )
    num_tenants = len({load.tenant for load in loads})
    prefill_steps = -(-4 * num_blocks * BLOCK_SIZE // max_batched_tokens)
    newcomers: dict[Request, int] = {}
    unfinished: set[Request] = set()
    aborts: dict[int, list[Request]] = {}
    step = 0
    while step <= 60 or simulation.scheduler.has_work():
        for n, load in enumerate(loads):
            if load.step == step:
                is_idle = load.tenant not in {request.tenant for request in unfinished}
                requests = add(simulation, load.tenant, load.count, load.num_prompt, load.max_tokens, f"-{n}-")
                unfinished.update(requests)
                if is_idle:
                    newcomers[requests[0]] = step
                if load.aborted_after is not None:
                    aborts.setdefault(step + load.aborted_after, []).append(requests[-1])
        for request in aborts.pop(step, []):
            simulation.abort(request)
            unfinished.discard(request)
        if simulation.scheduler.has_work():
            simulation.step()
        step += 1
        unfinished.difference_update(simulation.finished)
        for request in [r for r in newcomers if r.output_token_ids or r not in unfinished]:
            waited = step - newcomers.pop(request)
            own = -(-4 * num_tenants * len(request.prompt_token_ids) // max_batched_tokens)
            assert stalling or waited <= num_tenants * (prefill_steps + TURN_TOKENS + 1) + own
        assert step < 30_000, "starved"
    assert simulation.scheduler.stats().blocks_used == 0
    for request in simulation.finished:
        assert request.output_token_ids == expected_output(request.prompt_token_ids, request.sampling.max_tokens)
