"""How long an answer may get where the client does not say."""

from __future__ import annotations

import pytest

from evospec.engine.config import CacheConfig, SchedulerConfig
from evospec.engine.messages import EngineReady, SamplingParams
from evospec.engine.request import Request
from evospec.engine.scheduler import RequestTooLong, Scheduler
from evospec.server.params import TokenizedPrompt, default_max_tokens
from evospec.server.rate_limit import TokenBuckets
from evospec.server.tenants import Tenant

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


@pytest.mark.parametrize(
    ("prompts", "n", "most"), [(1, 1, 25), (1, 3, 8), (2, 1, 12), (2, 2, 6), (8, 1, 2), (9, 1, 1), (1, 99, 1)]
)
def test_all_outputs_have_a_quarter_of_a_bucket_and_a_full_one_less_the_prompts_at_most(
    prompts: int, n: int, most: int
) -> None:
    tenant = Tenant(name="small", tokens_per_minute=100)
    assert default_max_tokens([PROMPT] * prompts, n, engine(), tenant) == most


def test_a_bucket_pays_for_several_chats_that_ask_for_no_length() -> None:
    tenant, buckets = Tenant(name="small", tokens_per_minute=160), TokenBuckets(lambda: 0.0)
    most = default_max_tokens([PROMPT], 1, engine(), tenant)
    charges = [buckets.take(tenant, 1, len(PROMPT.token_ids) + most) for _ in range(3)]
    assert [lacking for lacking, _ in charges] == [None] * 3
