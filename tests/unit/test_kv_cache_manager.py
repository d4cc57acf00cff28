"""KVCacheManager by example: which prefixes are shared. ``test_block_pool.py`` has the property tests."""

from __future__ import annotations

from engine.kv_cache_manager import KVCacheManager
from engine.messages import SamplingParams
from engine.request import Request

BLOCK_SIZE = 2


def make_request(
    request_id: str, token_ids: list[int], tenant: str = "a", prompt_logprobs: int | None = None
) -> Request:
    sampling = SamplingParams(max_tokens=8, seed=0, prompt_logprobs=prompt_logprobs)
    return Request(request_id, b"client", tenant, sampling, token_ids)


def compute(manager: KVCacheManager, request: Request) -> None:
    """Run a request through its prompt, as the scheduler would."""
    assert manager.allocate(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    manager.cache_full_blocks(request)


def test_equal_prefixes_of_a_tenant_share_blocks() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=True)
    first = make_request("1", [1, 2, 3, 4, 5])
    compute(manager, first)
    second = make_request("2", [1, 2, 3, 4, 6])
    assert manager.find_cached_prefix(second) == 4
    compute(manager, second)
    assert manager.block_ids(second)[:2] == manager.block_ids(first)[:2]
    assert manager.num_used_blocks == 4


def test_other_tenants_and_other_prefixes_share_nothing() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_request("1", [1, 2, 3, 4, 5]))
    assert manager.find_cached_prefix(make_request("2", [1, 2, 3, 4, 5], tenant="b")) == 0
    assert manager.find_cached_prefix(make_request("3", [9, 9, 3, 4, 5])) == 0  # equal second block only


def test_a_fully_cached_prompt_leaves_its_last_token_to_compute() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_request("1", [1, 2, 3, 4]))
    assert manager.find_cached_prefix(make_request("2", [1, 2, 3, 4])) == 2
    assert manager.find_cached_prefix(make_request("3", [1, 2, 3, 4, 5])) == 4


def test_prompt_logprobs_need_every_row_computed() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=True)
    compute(manager, make_request("1", [1, 2, 3, 4, 5]))
    request = make_request("2", [1, 2, 3, 4, 5], prompt_logprobs=0)
    assert manager.find_cached_prefix(request) == 0
    request.output_token_ids.append(6)  # its prompt rows have been delivered
    assert manager.find_cached_prefix(request) == 4


def test_blocks_stay_cached_after_free_and_tails_are_evicted_first() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE, prefix_caching=True)
    request = make_request("1", [1, 2, 3, 4, 5, 6])
    compute(manager, request)
    manager.free(request)
    again = make_request("2", [1, 2, 3, 4, 5, 6, 7])
    assert manager.find_cached_prefix(again) == 6
    compute(manager, make_request("3", [8, 8, 8]))  # one block was never used, so one is evicted
    assert manager.find_cached_prefix(again) == 4


def test_content_computed_twice_is_cached_once() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=True)
    requests = [make_request(str(n), [1, 2, 3]) for n in range(2)]
    for request in requests:
        assert manager.allocate(request, 3)  # both before either is computed
    for request in requests:
        request.num_computed_tokens = 3
        manager.cache_full_blocks(request)
    third = make_request("3", [1, 2, 3])
    compute(manager, third)
    assert manager.block_ids(third)[0] == manager.block_ids(requests[0])[0]


def test_prefix_caching_can_be_off() -> None:
    manager = KVCacheManager(8, BLOCK_SIZE, prefix_caching=False)
    compute(manager, make_request("1", [1, 2, 3, 4, 5]))
    assert manager.find_cached_prefix(make_request("2", [1, 2, 3, 4, 5])) == 0


def test_allocate_keeps_blocks_free_when_asked() -> None:
    manager = KVCacheManager(4, BLOCK_SIZE, prefix_caching=True)
    request = make_request("1", [1, 2, 3, 4])
    assert not manager.allocate(request, 4, keep_free=3)
    assert manager.allocate(request, 4, keep_free=2)


def test_a_cached_prefix_that_is_free_counts_as_used_by_the_new_request() -> None:
    manager = KVCacheManager(3, BLOCK_SIZE, prefix_caching=True)
    request = make_request("1", [1, 2, 3, 4])
    compute(manager, request)
    manager.free(request)
    longer = make_request("2", [1, 2, 3, 4, 5])
    assert not manager.allocate(longer, 5, keep_free=1)
    assert manager.allocate(longer, 5)
    assert manager.num_used_blocks == 3
