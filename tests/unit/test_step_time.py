"""How many tokens fit in a step of so many milliseconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.config import CacheConfig, SchedulerConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.prompt_chunks import StepTime
from evospec.engine.request import Request
from evospec.engine.scheduler import LEAST_CHUNK, Scheduler
from tests.unit.scheduler_simulation import plan_step


def test_nothing_is_known_at_first() -> None:
    assert StepTime().tokens_in(0.1) is None


@given(each=st.floats(1e-5, 1e-2), sizes=st.lists(st.integers(1, 512), min_size=1))
def test_what_tokens_cost_is_known(each: float, sizes: list[int]) -> None:
    known = StepTime()
    for size in sizes:
        known.record(size, each * size)
    assert known.tokens_in(each * 300) == pytest.approx(300, abs=1)


def test_the_past_fades() -> None:
    known = StepTime()
    for seconds in (1e-3, 1e-4):
        for size in [10, 100] * 20:
            known.record(size, seconds * size)
    assert known.tokens_in(0.01) == pytest.approx(100, rel=0.05)


def make_request(name: str, num_tokens: int) -> Request:
    return Request(name, b"", "tenant", SamplingParams(max_tokens=50, seed=0), list(range(num_tokens)))


@pytest.mark.parametrize(("each", "expected"), [(0.1e-3, 499), (1e-3, 100), (10e-3, LEAST_CHUNK)])
def test_prompts_are_read_in_chunks_that_fit_beside_decodes(each: float, expected: int) -> None:
    """With nobody to wait for the next token, a step has all the tokens that it may have."""
    config = SchedulerConfig(max_num_seqs=4, max_batched_tokens=500, prompt_ms=100)
    scheduler = Scheduler(config, CacheConfig(), num_blocks=200, max_model_len=4096)
    scheduler.add(make_request("short", 20))
    plan = plan_step(scheduler)
    [first] = plan.sequences
    assert len(first.token_ids) == 20
    scheduler.record_seconds(plan, each * plan.num_tokens)
    scheduler.commit(first, [1], finished=False)
    scheduler.add(make_request("long", 2000))
    decode, chunk = plan_step(scheduler).sequences
    assert len(decode.token_ids) == 1
    assert len(chunk.token_ids) == pytest.approx(expected, abs=expected / 20)
    scheduler.commit(decode, [1], finished=True)
    scheduler.commit(chunk, [], finished=False)
    [alone] = plan_step(scheduler).sequences
    assert len(alone.token_ids) == 500
