"""What it costs to admit many requests whose prompts are cached; ``test_tenant_shares.py`` has who is admitted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from evospec.engine.block_pool import BlockPool
from evospec.engine.kv_cache_manager import KVCacheManager
from evospec.engine.request import Request
from tests.unit.scheduler_simulation import BLOCK_SIZE, Simulation, expected_output, make_request

NUM_BLOCKS, NUM_CHOICES = 10, 40
NUM_PROMPT = NUM_BLOCKS * BLOCK_SIZE + 1


def with_cached_prompt(max_batched_tokens: int = 200) -> Simulation:
    """A scheduler with room for all choices of a prompt that it has computed before."""
    simulation = Simulation(500, NUM_CHOICES + 10, max_batched_tokens)
    simulation.scheduler.add(make_request("first", NUM_PROMPT, max_tokens=1))
    simulation.run(max_steps=10)
    return simulation


def add_choices(simulation: Simulation) -> list[Request]:
    choices = [make_request(str(number), NUM_PROMPT) for number in range(NUM_CHOICES)]
    for request in choices:
        simulation.scheduler.add(request)
    return choices


@pytest.mark.parametrize("is_alone", [True, False])
def test_blocks_of_each_prompt_are_looked_up_once(monkeypatch: pytest.MonkeyPatch, is_alone: bool) -> None:
    """And those that run are looked at a few times a step, not again for each that is admitted."""
    calls: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def counted(*args: Any) -> Any:
            calls[name] += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counted)

    simulation = with_cached_prompt()
    if not is_alone:
        simulation.scheduler.add(make_request("other", num_prompt=3, max_tokens=40, tenant="b"))
        simulation.step()
    choices = add_choices(simulation)
    count(BlockPool, "lookup")
    count(KVCacheManager, "can_grow")
    sequences = simulation.step().sequences
    assert {sequence.request for sequence in sequences} >= set(choices)
    assert calls["lookup"] <= (NUM_CHOICES + 3) * NUM_BLOCKS
    assert calls["can_grow"] <= 3 * NUM_CHOICES


@pytest.mark.parametrize("most", [1, 3 * NUM_PROMPT, 10**6])
def test_a_step_admits_few_long_prompts_that_are_cached(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """In order, and all of them, while a sequence that runs gets its token in each step and a newcomer its place."""
    monkeypatch.setattr("evospec.engine.admission.MOST_CACHED_TOKENS", most)
    simulation = with_cached_prompt()
    running = make_request("running", num_prompt=3, max_tokens=100, tenant="b")
    simulation.scheduler.add(running)
    simulation.step()
    choices = add_choices(simulation)
    newcomer = make_request("newcomer", num_prompt=3, tenant="c")
    simulation.scheduler.add(newcomer)
    began: list[Request] = []
    while len(began) < NUM_CHOICES:
        num_output = len(running.output_token_ids)
        computed = {sequence.request for sequence in simulation.step().sequences}
        new = [request for request in choices if request in computed and request not in began]
        assert 1 <= len(new) <= most // (NUM_BLOCKS * BLOCK_SIZE) + 1
        assert newcomer.output_token_ids
        assert len(running.output_token_ids) == num_output + 1
        began += new
    assert began == choices
    simulation.run(max_steps=200)
    assert all(r.output_token_ids == expected_output(r.prompt_token_ids, 4) for r in choices)
