"""What the prefix cache gives, to whom, and what it never gives. ``test_block_pool.py`` has its bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.kv_cache_manager import KVCacheManager, hash_block, tenant_root
from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request

BLOCK_SIZE = 4
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)


def request(name: str, prompt: list[int], tenant: str = "red", prompt_logprobs: int | None = None) -> Request:
    sampling = SamplingParams(max_tokens=8, seed=0, prompt_logprobs=prompt_logprobs)
    return Request(name, b"", tenant, sampling, prompt)


def manager(num_blocks: int = 16, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, prefix_caching)


def compute(kv: KVCacheManager, request: Request, num_tokens: int | None = None) -> None:
    """Admit the request and compute its first tokens (default: all), as one committed step."""
    assert kv.allocate(request, request.num_tokens, cached=kv.cached_blocks(request))
    request.num_computed_tokens = request.num_tokens if num_tokens is None else num_tokens
    kv.after_commit(request)


def answer(kv: KVCacheManager, request: Request, tokens: Sequence[int]) -> None:
    """Its output grows by these, and all of it is computed."""
    request.output_token_ids += tokens
    request.all_token_ids += tokens
    compute(kv, request)


def num_cached(kv: KVCacheManager, request: Request) -> int:
    """How many of the request's first tokens the prefix cache has."""
    return len(kv.cached_blocks(request)) * BLOCK_SIZE


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(tokens, tokens)
def test_full_blocks_of_the_common_prefix_are_shared(first: list[int], second: list[int]) -> None:
    kv = manager()
    compute(kv, earlier := request("a", first))
    later = request("b", second)
    expected = min(common_prefix(first, second), len(second) - 1) // BLOCK_SIZE
    assert num_cached(kv, later) == expected * BLOCK_SIZE
    assert kv.allocate(later, later.num_tokens, cached=kv.cached_blocks(later))
    shared = set(earlier.block_ids) & set(later.block_ids)
    assert len(shared) == expected


def test_blocks_of_an_ended_request_are_found_again() -> None:
    kv, prompt = manager(), list(range(10))
    compute(kv, first := request("a", prompt))
    blocks = list(first.block_ids)
    kv.free(first)
    assert kv.num_used_blocks == 0
    compute(kv, later := request("b", prompt))
    assert list(later.block_ids[:2]) == blocks[:2]


def test_what_a_window_gave_back_is_found_while_nobody_needs_it() -> None:
    """A prefix is found from its first block on, so not at all once that has another owner."""
    kv, prompt = KVCacheManager(5, BLOCK_SIZE, prefix_caching=True, window=4), list(range(16))
    compute(kv, first := request("a", prompt))
    assert kv.num_used_blocks == 1
    blocks = list(first.block_ids)
    compute(kv, later := request("b", [*prompt, 1]), 12)
    assert list(later.block_ids[:4]) == blocks
    kv.free(first)
    kv.free(later)
    compute(kv, request("c", [*range(20, 37)]))
    assert num_cached(kv, request("d", [*prompt, 1])) == 0


def test_cached_blocks_are_given_up_only_when_no_others_are_left() -> None:
    kv, prompt = manager(num_blocks=4), list(range(9))
    compute(kv, first := request("a", prompt))
    kv.free(first)
    compute(kv, request("b", [7] * 8))
    assert num_cached(kv, request("c", prompt)) == 8
    compute(kv, request("d", [8]))
    assert num_cached(kv, request("c", prompt)) == 4, "the end of a prefix goes before its beginning"


@pytest.mark.parametrize("prompt", [[1] * 12, list(range(12))])
def test_tenants_never_share(prompt: list[int]) -> None:
    kv = manager()
    compute(kv, red := request("a", prompt, "red"))
    compute(kv, blue := request("b", prompt, "blue"))
    assert not set(red.block_ids) & set(blue.block_ids)
    assert num_cached(kv, request("c", prompt, "green")) == 0


@given(st.text(), st.text(), tokens)
def test_hash_chains_of_tenants_differ_from_the_root(one: str, other: str, token_ids: list[int]) -> None:
    chains = {hash_block(tenant_root(tenant), token_ids) for tenant in (one, other)}
    assert len(chains) == len({one, other})


def test_a_preempted_request_finds_its_own_output_again() -> None:
    kv = manager()
    compute(kv, request("of the same prompt", list(range(6))))
    preempted = request("a", list(range(6)), prompt_logprobs=0)
    assert num_cached(kv, preempted) == 0, "every row of its prompt is wanted"
    compute(kv, preempted)
    for token in (6, 7, 8):
        preempted.output_token_ids.append(token)
        preempted.all_token_ids.append(token)
    kv.allocate(preempted, 9)
    preempted.num_computed_tokens = 8
    kv.after_commit(preempted)
    kv.free(preempted)
    assert num_cached(kv, preempted) == 8


def test_answers_are_not_offered_where_a_prompt_would_have_another_kv() -> None:
    kv = KVCacheManager(16, BLOCK_SIZE, prefix_caching=True, reads_prompts_apart=True)
    compute(kv, first := request("a", list(range(6))))
    answer(kv, first, range(6, 12))
    later = request("b", list(range(14)))
    assert num_cached(kv, later) == 4
    compute(kv, later)
    assert num_cached(kv, request("c", list(range(14)))) == 12


def test_an_answer_is_not_taken_from_a_prompt_where_that_has_another_kv() -> None:
    """Another's prompt holds what a preempted sequence was answered."""
    kv = KVCacheManager(16, BLOCK_SIZE, prefix_caching=True, reads_prompts_apart=True)
    compute(kv, preempted := request("a", list(range(6))))
    answer(kv, preempted, range(6, 14))
    compute(kv, request("b", list(range(13))))
    kv.free(preempted)
    assert num_cached(kv, preempted) == 4


def test_only_full_blocks_of_computed_tokens_are_offered() -> None:
    kv, prompt = manager(), list(range(12))
    compute(kv, first := request("a", prompt), num_tokens=7)
    assert num_cached(kv, request("b", prompt)) == 4
    first.num_computed_tokens = 8
    kv.after_commit(first)
    assert num_cached(kv, request("b", prompt)) == 8


def test_drafts_are_not_offered() -> None:
    """Blocks that hold drafts are full of written KV, but their tokens were not accepted."""
    kv, known, drafts = manager(), list(range(6)), [6, 7, 8, 9]
    drafting = request("a", known)
    assert kv.allocate(drafting, len(known) + len(drafts))
    drafting.num_computed_tokens = 6
    kv.after_commit(drafting)
    assert num_cached(kv, request("b", [*known, *drafts])) == 4


def test_trim_takes_back_what_only_drafts_used() -> None:
    kv, drafting = manager(), request("a", list(range(6)))
    assert kv.allocate(drafting, 17)
    assert kv.num_used_blocks == 5
    kv.trim(drafting)
    assert kv.num_used_blocks == 2
    assert kv.num_slots(drafting) == 8


def test_refusal_changes_nothing() -> None:
    kv = manager(num_blocks=3)
    compute(kv, holder := request("a", list(range(8))))
    assert not kv.allocate(request("b", [9] * 5), 5)
    assert not kv.allocate(request("c", [9] * 4), 4, keep_free=1)
    assert not kv.allocate(holder, 17)
    assert kv.num_used_blocks == 2
    assert kv.allocate(request("d", [9] * 4), 4)


def test_it_can_be_off() -> None:
    kv = manager(prefix_caching=False)
    compute(kv, request("a", list(range(10))))
    assert num_cached(kv, request("b", list(range(10)))) == 0


def test_free_is_harmless_for_a_request_without_blocks() -> None:
    kv = manager()
    kv.free(request("a", [1]))
    assert kv.num_used_blocks == 0
