"""How long an answer may get where the client does not say."""

from __future__ import annotations

import pytest

from engine.config import CacheConfig, SchedulerConfig
from engine.messages import EngineReady, SamplingParams
from engine.request import Request
from engine.scheduler import RequestTooLong, Scheduler
from server.params import TokenizedPrompt, default_max_tokens
from server.tenants import Tenant

PROMPT = TokenizedPrompt([1] * 10)
ANYONE = Tenant(name="anyone")


def engine(num_blocks: int = 100) -> EngineReady:
    return EngineReady(
        epoch="", model="m", max_model_len=100, vocab_size=10, num_blocks=num_blocks, block_size=16, max_num_seqs=1,
        dtype="float32", attention_backend="none",
    )  # fmt: skip


def test_the_context_bounds_it() -> None:
    assert default_max_tokens([PROMPT, TokenizedPrompt([1] * 30)], 3, engine(), ANYONE) == 70


def test_the_kv_cache_bounds_it_as_the_scheduler_does() -> None:
    info = engine(num_blocks=2)
    scheduler = Scheduler(SchedulerConfig(), CacheConfig(), info.num_blocks, info.max_model_len)
    most = default_max_tokens([PROMPT], 1, info, ANYONE)
    assert 1 < most < 90
    with pytest.raises(RequestTooLong):
        scheduler.add(Request("long", b"", "anyone", SamplingParams(max_tokens=most + 1, seed=0), PROMPT.token_ids))
    scheduler.add(Request("fits", b"", "anyone", SamplingParams(max_tokens=most, seed=0), PROMPT.token_ids))


@pytest.mark.parametrize(("prompts", "n", "most"), [(1, 1, 51), (1, 3, 17), (2, 1, 20), (2, 2, 10), (6, 1, 1)])
def test_a_full_bucket_bounds_all_prompts_and_outputs_together(prompts: int, n: int, most: int) -> None:
    tenant = Tenant(name="small", tokens_per_minute=61)
    assert default_max_tokens([PROMPT] * prompts, n, engine(), tenant) == most
