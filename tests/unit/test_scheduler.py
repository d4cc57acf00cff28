"""The scheduler's promises: order, bounds, fairness, no starvation, no leak."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.fair_queue import equal_share
from evospec.engine.prompt_chunks import MOST_PROMPT_ROWS
from evospec.engine.request import Request
from evospec.engine.scheduler import QueueFull, RequestTooLong
from evospec.engine.step import Decodes
from tests.unit.scheduler_simulation import Simulation, expected_output, make_request, plan_step


@dataclass(frozen=True)
class Arrival:
    step: int
    tenant: str
    prompt: list[int]
    max_tokens: int
    abort_at: int | None
    prompt_logprobs: int | None


prompts = st.builds(
    lambda shared, rest: [2] * shared + rest, st.integers(0, 50), st.lists(st.integers(0, 4), min_size=1, max_size=12)
)
arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    tenant=st.sampled_from("abc"),
    prompt=prompts,
    max_tokens=st.integers(1, 40),
    abort_at=st.none() | st.none() | st.integers(0, 40),
    prompt_logprobs=st.none() | st.none() | st.just(0),
)
simulations = st.builds(
    Simulation,
    num_blocks=st.integers(7, 20),
    max_num_seqs=st.integers(1, 8),
    max_batched_tokens=st.integers(16, 40),
    max_model_len=st.integers(63, 110),
    prefix_caching=st.booleans(),
    num_drafts=st.integers(0, 20),
    accuracy=st.sampled_from([0.0, 0.5, 1.0]),
    stalling=st.sampled_from([0.0, 0.0, 0.3]),
    reads_prompts_apart=st.booleans(),
)

most_cached = st.sampled_from([1, 40, 10**6])
"""Cached tokens with which a step admits no more."""


@settings(max_examples=150)
@given(simulation=simulations, arrivals=st.lists(arrivals, min_size=1, max_size=20), most_cached=most_cached)
def test_every_request_finishes_with_the_models_own_output(
    simulation: Simulation, arrivals: list[Arrival], most_cached: int
) -> None:
    with patch("evospec.engine.admission.MOST_CACHED_TOKENS", most_cached):
        check_every_request_finishes(simulation, arrivals)


def check_every_request_finishes(simulation: Simulation, arrivals: list[Arrival]) -> None:
    """Whatever arrives, is aborted, drafted or preempted; ``Simulation`` checks bounds, order and KV at each step."""
    requests = {
        str(n): make_request(str(n), 0, a.max_tokens, a.tenant, a.prompt_logprobs, a.prompt)
        for n, a in enumerate(arrivals)
    }
    aborts = {a.abort_at: str(n) for n, a in enumerate(arrivals) if a.abort_at is not None}
    for step in range(41):
        for n, arrival in enumerate(arrivals):
            if arrival.step == step:
                simulation.scheduler.add(requests[str(n)])
        if simulation.scheduler.has_work():
            simulation.step(abort=aborts.get(step))
    simulation.run(max_steps=10 * sum(len(a.prompt) + a.max_tokens for a in arrivals))

    finished = set(simulation.finished)
    aborted = {requests[request_id] for request_id in aborts.values()}
    assert finished | aborted >= set(requests.values())
    for request in finished:
        room = min(request.sampling.max_tokens, simulation.max_model_len - len(request.prompt_token_ids))
        assert request.output_token_ids == expected_output(request.prompt_token_ids, room)


@settings(max_examples=50)
@given(num_blocks=st.integers(8, 30), num_prompt=st.integers(1, 80), heavy_prompt=st.integers(1, 80))
@pytest.mark.parametrize("most_cached", [1, 10**6])
def test_a_request_is_not_starved_by_endless_arrivals(
    most_cached: int, num_blocks: int, num_prompt: int, heavy_prompt: int
) -> None:
    with patch("evospec.engine.admission.MOST_CACHED_TOKENS", most_cached):
        check_a_request_is_not_starved(num_blocks, num_prompt, heavy_prompt)


def check_a_request_is_not_starved(num_blocks: int, num_prompt: int, heavy_prompt: int) -> None:
    """All prompts are alike, so that they are cached."""
    simulation = Simulation(num_blocks, max_num_seqs=4, max_model_len=128)
    request = make_request("patient", num_prompt, max_tokens=20, tenant="light")
    for n in range(10):
        simulation.scheduler.add(make_request(f"early{n}", heavy_prompt, max_tokens=30, tenant="heavy"))
    simulation.scheduler.add(request)
    for n in range(400):
        simulation.scheduler.add(make_request(f"late{n}", heavy_prompt, max_tokens=30, tenant="heavy"))
        simulation.scheduler.add(make_request(f"other{n}", heavy_prompt, max_tokens=30, tenant=f"other{n % 7}"))
        if request in simulation.finished:
            return
        simulation.step()
    pytest.fail("starved")


@settings(max_examples=30)
@given(
    prompts=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    outputs=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_drafts=st.integers(0, 3),
)
def test_backlogged_tenants_get_equal_service(
    prompts: tuple[int, int], outputs: tuple[int, int], num_drafts: int
) -> None:
    """Service (prompt tokens + 2 x output tokens) never differs by more than what is in flight."""
    max_num_seqs = 4
    simulation = Simulation(max_num_seqs=max_num_seqs, num_drafts=num_drafts, prefix_caching=False)
    costs = [p + 2 * o for p, o in zip(prompts, outputs, strict=True)]
    for tenant, count, num_prompt, max_tokens in zip(("many", "few"), (900, 60), prompts, outputs, strict=True):
        for n in range(count):
            simulation.scheduler.add(make_request(f"{tenant}{n}", num_prompt, max_tokens, tenant))
    service = {"many": 0, "few": 0}
    num_output: Counter[Request] = Counter()
    while len(simulation.scheduler.stats().waiting_by_tenant) == 2:
        for sequence in simulation.step().sequences:
            request = sequence.request
            if request not in num_output:
                service[request.tenant] += len(request.prompt_token_ids)
            service[request.tenant] += 2 * (len(request.output_token_ids) - num_output[request])
            num_output[request] = len(request.output_token_ids)
        assert abs(service["many"] - service["few"]) <= max_num_seqs * max(costs)


def test_a_tenants_first_request_passes_another_tenants_queue() -> None:
    simulation = Simulation(max_num_seqs=2)
    for n in range(900):
        simulation.scheduler.add(make_request(f"a{n}"))
    for _ in range(20):
        simulation.step()
    late = make_request("b", tenant="b")
    simulation.scheduler.add(late)
    num_finished = len(simulation.finished)
    while late not in simulation.finished:
        simulation.step()
    # Those running when it came, the one whose turn it was on equal service, and who runs beside it.
    assert len(simulation.finished) - num_finished <= 5


def test_idle_time_earns_no_credit() -> None:
    simulation = Simulation(max_num_seqs=2)
    idle = make_request("idle", tenant="idle")
    simulation.scheduler.add(idle)
    simulation.run(max_steps=20)
    for n in range(100):
        simulation.scheduler.add(make_request(f"busy{n}", tenant="busy"))
    while simulation.scheduler.stats().num_waiting > 40:
        simulation.step()
    for n in range(40):
        simulation.scheduler.add(make_request(f"idle{n}", tenant="idle"))
    simulation.finished.clear()
    while len(simulation.finished) < 40:
        simulation.step()
    by_tenant = [request.tenant for request in simulation.finished]
    assert abs(by_tenant.count("busy") - by_tenant.count("idle")) <= 4


def test_idle_time_earns_no_credit_where_nobody_waits() -> None:
    """What another was given since its turn came counts, though its queue is empty; whoever asks first then."""
    simulation = Simulation(max_num_seqs=2, max_model_len=200, num_blocks=60)
    simulation.scheduler.add(make_request("idle", tenant="idle"))
    simulation.run(max_steps=20)
    for n in range(2):
        simulation.scheduler.add(make_request(f"long{n}", max_tokens=150, tenant="busy"))
    for _ in range(120):
        simulation.step()
    for tenant in ("idle", "busy"):
        for n in range(20):
            simulation.scheduler.add(make_request(f"{tenant}{n}", tenant=tenant))
    simulation.finished.clear()
    while len(simulation.finished) < 20:
        simulation.step()
    by_tenant = [request.tenant for request in simulation.finished]
    assert by_tenant.count("busy") >= 6


def test_requests_that_no_blocks_are_left_for_do_not_join_soon() -> None:
    """So drafts need not make room for them."""
    joining = []

    class Watching(Simulation):
        def _lengths(self, decodes: Decodes) -> list[int]:
            joining.append(decodes.num_joining)
            return super()._lengths(decodes)

    simulation = Watching(num_blocks=8, max_num_seqs=8, num_drafts=2)
    for n in range(20):
        simulation.scheduler.add(make_request(str(n), num_prompt=48, max_tokens=20))
    simulation.run(max_steps=200)
    assert joining.count(0) > 0.8 * len(joining)


def test_decodes_go_on_during_a_long_prefill_and_the_prefill_gets_its_share() -> None:
    simulation = Simulation(max_num_seqs=20, max_batched_tokens=32, num_drafts=4)
    decoding = [make_request(str(n), max_tokens=60) for n in range(8)]
    for request in decoding:
        simulation.scheduler.add(request)
    simulation.step()
    long = make_request("long", num_prompt=200)
    simulation.scheduler.add(long)
    while long.num_computed_tokens < 200:
        sequences = {s.request: s for s in simulation.step().sequences}
        assert set(decoding) <= set(sequences)
        assert len(sequences[long].token_ids) >= min(12, 200 - sequences[long].start)


def test_prefill_goes_on_beside_as_many_decodes_as_there_can_be() -> None:
    simulation = Simulation(max_num_seqs=16, max_batched_tokens=16)
    for n in range(20):
        simulation.scheduler.add(make_request(str(n), max_tokens=40))
    long = make_request("long", num_prompt=80)
    simulation.scheduler.add(long)
    sequences = [s for output in simulation.run(max_steps=300) for s in output.sequences if s.request is long]
    chunks = [len(s.token_ids) for s in sequences if s.num_sampled == 0]
    assert chunks
    assert min(chunks[1:]) >= 8


def test_a_short_prompt_need_not_wait_for_a_long_prefill() -> None:
    simulation = Simulation(max_batched_tokens=32)
    long, short = make_request("long", num_prompt=200, max_tokens=1), make_request("short", max_tokens=1, tenant="b")
    simulation.scheduler.add(long)
    simulation.step()
    simulation.scheduler.add(short)
    simulation.run(max_steps=10)
    assert simulation.finished == [short, long]


def test_the_sequence_admitted_last_is_preempted_and_goes_on_from_its_cached_prefix() -> None:
    simulation = Simulation(num_blocks=6)
    first, second = (make_request(str(n), token_ids=[n] * 30, max_tokens=40) for n in range(2))
    simulation.scheduler.add(first)
    simulation.scheduler.add(second)
    outputs = simulation.run(max_steps=100)
    preempted = [request for output in outputs for request in output.preempted]
    assert set(preempted) == {second}
    assert simulation.scheduler.stats().preemptions == len(preempted)
    assert simulation.finished == [first, second]
    resumed = [s for o in outputs for s in o.sequences if s.request is second and s.start and len(s.token_ids) > 1]
    assert resumed, "nothing of its prefix was reused"


def test_preempted_requests_resume_in_order_of_admission() -> None:
    simulation = Simulation(num_blocks=8, max_batched_tokens=100)
    requests = [make_request(str(n), token_ids=[n] * 30, max_tokens=60) for n in range(3)]
    for request in requests:
        simulation.scheduler.add(request)
    outputs = simulation.run(max_steps=200)
    assert [request for output in outputs for request in output.preempted] == [requests[2], requests[1]]
    assert simulation.finished == requests


def test_a_request_is_not_admitted_into_the_blocks_that_others_need_next() -> None:
    simulation = Simulation(num_blocks=4, max_batched_tokens=100)
    for n in range(2):
        simulation.scheduler.add(make_request(str(n), token_ids=[n] * 30, max_tokens=20))
    simulation.run(max_steps=50)
    assert simulation.scheduler.stats().preemptions == 0


@pytest.mark.parametrize("num_drafts", [0, 8])
def test_drafts_delay_nobodys_admission(num_drafts: int) -> None:
    """The block that a running sequence's drafts were given is the one that is kept free for it to grow."""
    simulation = Simulation(num_blocks=30, max_num_seqs=32, max_batched_tokens=512, num_drafts=num_drafts, accuracy=0.0)
    for n in range(8):
        simulation.scheduler.add(make_request(str(n), token_ids=[n] * 15, max_tokens=80))
    simulation.step()
    late = make_request("late", token_ids=[9] * 176, max_tokens=4)
    simulation.scheduler.add(late)
    assert any(late in [s.request for s in simulation.step().sequences] for _ in range(3))


def test_drafts_are_dropped_before_anyone_is_preempted() -> None:
    """Three blocks are just enough, if the first does not hold a second one for drafts that were rejected."""
    simulation = Simulation(num_blocks=3, num_drafts=16, accuracy=0.0, max_batched_tokens=64)
    simulation.scheduler.add(make_request("1", token_ids=[1], max_tokens=20))
    simulation.scheduler.add(make_request("2", token_ids=[2] * 14, max_tokens=10))
    outputs = simulation.run(max_steps=40)
    assert simulation.scheduler.stats().preemptions == 0
    assert any(s.start < 16 and len(s.block_ids) > 1 for s in outputs[1].sequences)


def test_draft_tokens_are_shared_out_when_the_budget_is_short() -> None:
    simulation = Simulation(max_batched_tokens=16, num_drafts=5)
    for n in range(4):
        simulation.scheduler.add(make_request(str(n), token_ids=[n] * 4, max_tokens=30))
    simulation.step()
    assert [s.num_draft_tokens for s in simulation.step().sequences] == [3, 3, 3, 3]


def test_prompt_logprobs_get_a_row_for_every_prompt_token() -> None:
    simulation = Simulation(max_batched_tokens=16)
    simulation.scheduler.add(make_request("cached", num_prompt=40))
    simulation.run(max_steps=20)
    simulation.scheduler.add(make_request("1", num_prompt=40, max_tokens=2, prompt_logprobs=1))
    sequences = [s for output in simulation.run(max_steps=20) for s in output.sequences]
    assert [(s.start, s.num_prompt_logits, s.num_sampled, s.num_logits) for s in sequences] == [
        (0, 16, 0, 16),
        (16, 16, 0, 16),
        (32, 7, 1, 8),
        (40, 0, 1, 1),
    ]


def test_few_rows_of_prompts_are_computed_in_a_step() -> None:
    """However many ask for them; whoever does not goes on as ever."""
    simulation = Simulation(num_blocks=400, max_batched_tokens=2048, max_model_len=1024, prefix_caching=False)
    asking = [make_request(str(n), num_prompt=500, tenant="b", prompt_logprobs=0) for n in range(4)]
    other = make_request("other", num_prompt=900)
    for request in [*asking, other]:
        simulation.scheduler.add(request)
    outputs = simulation.run(max_steps=20)
    assert simulation.finished[0] is other
    rows = [sum(sequence.num_prompt_logits for sequence in output.sequences) for output in outputs]
    assert sum(rows) == sum(len(request.prompt_token_ids) - 1 for request in asking)
    assert MOST_PROMPT_ROWS - len(asking) <= max(rows) <= MOST_PROMPT_ROWS
    assert rows.count(0) < len(rows) / 2


def test_endless_short_prompts_do_not_keep_a_long_one_from_its_rows() -> None:
    simulation = Simulation(num_blocks=400, max_batched_tokens=2048, max_model_len=4096, prefix_caching=False)
    long = make_request("long", num_prompt=2000, prompt_logprobs=0)
    simulation.scheduler.add(long)
    for n in range(40):
        for tenant in "bcd":
            short = make_request(f"{tenant}{n}", num_prompt=100, max_tokens=1, tenant=tenant, prompt_logprobs=0)
            simulation.scheduler.add(short)
        simulation.step()
    assert long in simulation.finished


def test_requests_that_can_never_fit_are_refused() -> None:
    scheduler = Simulation(num_blocks=4, max_model_len=100).scheduler
    with pytest.raises(RequestTooLong, match="100 tokens; with"):
        scheduler.add(make_request("1", num_prompt=100, max_tokens=1))
    with pytest.raises(RequestTooLong, match="whole KV cache of 64 tokens"):
        scheduler.add(make_request("2", num_prompt=40, max_tokens=26))
    scheduler.add(make_request("3", num_prompt=40, max_tokens=25))  # the last token needs no slot
    assert scheduler.stats().num_waiting == 1


def test_the_queue_is_bounded() -> None:
    scheduler = Simulation(max_waiting=2).scheduler
    scheduler.add(make_request("1"))
    scheduler.add(make_request("2"))
    with pytest.raises(QueueFull):
        scheduler.add(make_request("3"))
    scheduler.abort("1")
    scheduler.add(make_request("3"))


def test_a_tenant_that_fills_the_queue_does_not_lock_out_others() -> None:
    scheduler = Simulation(max_waiting=4).scheduler
    for name in "1234":
        scheduler.add(make_request(name, tenant="a"))
    for name in "56":
        scheduler.add(make_request(name, tenant="b"))
    for tenant in "ab":
        with pytest.raises(QueueFull):
            scheduler.add(make_request("7", tenant=tenant))


def test_more_tenants_than_places_have_one_each() -> None:
    assert equal_share(4, {"a": 9, "b": 1}, "b") == 2
    assert equal_share(4, {"a": 9, "b": 1}, "c") == 1
    assert equal_share(1, {"a": 9}, "b") == 1


def test_a_request_id_is_taken_once() -> None:
    scheduler = Simulation().scheduler
    scheduler.add(make_request("1"))
    with pytest.raises(ValueError, match="already"):
        scheduler.add(make_request("1"))


def test_commit_after_abort_changes_nothing() -> None:
    scheduler = Simulation().scheduler
    request = make_request("1")
    scheduler.add(request)
    (sequence,) = plan_step(scheduler).sequences
    assert scheduler.abort("1") is request
    assert scheduler.abort("1") is None
    scheduler.commit(sequence, [3], finished=False)
    assert request.output_token_ids == []
    assert not scheduler.has_work()
    assert scheduler.stats().blocks_used == 0


def test_a_stalled_sequence_computes_nothing_and_keeps_its_blocks() -> None:
    simulation = Simulation(num_drafts=2)
    stalled, other = make_request("1", token_ids=[1] * 20), make_request("2", max_tokens=9)
    simulation.scheduler.add(stalled)
    simulation.scheduler.add(other)
    simulation.step()
    stalled.is_stalled = True
    for _ in range(3):
        assert [s.request for s in simulation.step().sequences] == [other]
    assert simulation.scheduler.stats().num_running == 2
    stalled.is_stalled = False
    (sequence, _) = simulation.step().sequences
    assert (sequence.request, sequence.start) == (stalled, 20)


def test_where_all_are_stalled_a_step_is_empty() -> None:
    scheduler = Simulation().scheduler
    request = make_request("1")
    scheduler.add(request)
    request.is_stalled = True
    assert plan_step(scheduler).sequences == []
    assert scheduler.has_work()


def test_a_stalled_request_that_waits_holds_up_nobody() -> None:
    simulation = Simulation(max_num_seqs=1)
    stalled, same, other = make_request("1"), make_request("2"), make_request("3", tenant="b")
    for request in (stalled, same, other):
        simulation.scheduler.add(request)
    stalled.is_stalled = True
    while len(simulation.finished) < 2:
        simulation.step()
    assert set(simulation.finished) == {same, other}
    stalled.is_stalled = False
    simulation.run(max_steps=10)
    assert simulation.finished[-1] is stalled


def test_a_postponed_sequence_computes_its_last_token_again() -> None:
    scheduler = Simulation(max_batched_tokens=32).scheduler
    request = make_request("1", num_prompt=20)
    scheduler.add(request)
    (sequence,) = plan_step(scheduler).sequences
    scheduler.postpone(sequence)
    assert request.num_computed_tokens == 19
    (sequence,) = plan_step(scheduler).sequences
    assert (sequence.start, sequence.token_ids, sequence.num_sampled) == (19, [1], 1)
    scheduler.commit(sequence, [3], finished=False)
    (sequence,) = plan_step(scheduler).sequences
    scheduler.abort("1")
    scheduler.postpone(sequence)
    assert not scheduler.has_work()


def test_commit_without_a_new_token_is_an_error() -> None:
    scheduler = Simulation().scheduler
    scheduler.add(make_request("1"))
    (sequence,) = plan_step(scheduler).sequences
    with pytest.raises(ValueError, match="new token"):
        scheduler.commit(sequence, [], finished=False)


def test_stats_count_prefix_hits_and_waiting_requests() -> None:
    simulation = Simulation(max_num_seqs=1)
    for n in range(2):
        simulation.scheduler.add(make_request(str(n), num_prompt=40))
    simulation.scheduler.add(make_request("b", num_prompt=40, tenant="b"))
    simulation.step()
    stats = simulation.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (1, 2, 3)
    assert stats.waiting_by_tenant == {"a": 1, "b": 1}
    simulation.run(max_steps=40)
    stats = simulation.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (120, 32)
    assert [request.num_cached_tokens for request in simulation.finished] == [0, 0, 32]
