"""Blocks under any sequence of operations: none leaked, none shared wrongly, none overwritten while in use."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from evospec.engine.block_pool import BlockPool
from evospec.engine.kv_cache_manager import KVCacheManager
from evospec.engine.messages import SamplingParams
from evospec.engine.request import Request


class BlockPoolMachine(RuleBasedStateMachine):
    """``BlockPool`` against a model: users of each block, hash of each block, free blocks in order of reuse."""

    owners = Bundle("owners")

    @initialize(num_blocks=st.integers(1, 8))
    def create(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.users = [0] * num_blocks
        self.hash_of: dict[int, bytes] = {}
        self.freed_at = [0] * num_blocks
        self.clock = 0

    @rule(target=owners, count=st.integers(0, 4))
    def allocate(self, count: int) -> list[int]:
        free = [block for block, users in enumerate(self.users) if users == 0]
        if count > len(free):
            with pytest.raises(ValueError, match="free"):
                self.pool.allocate(count)
            return []
        # Blocks without a cached prefix first, then the least recently freed.
        plain = [block for block in free if block not in self.hash_of]
        cached = sorted((block for block in free if block in self.hash_of), key=self.freed_at.__getitem__)
        blocks = self.pool.allocate(count)
        assert set(blocks[: len(plain)]) <= set(plain)
        assert blocks[len(plain) :] == cached[: max(count - len(plain), 0)]
        assert len(set(blocks)) == count
        for block in blocks:
            self.users[block] = 1
            self.hash_of.pop(block, None)
        return blocks

    @rule(target=owners, prefix_hash=st.sampled_from([b"a", b"b", b"c"]))
    def reuse(self, prefix_hash: bytes) -> list[int]:
        block = self.pool.lookup(prefix_hash)
        if block is None:
            return []
        self.pool.touch([block])
        self.users[block] += 1
        return [block]

    @rule(blocks=owners, prefix_hash=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, blocks: list[int], prefix_hash: bytes) -> None:
        block = next((b for b in blocks if self.users[b] and b not in self.hash_of), None)
        if block is not None:
            self.pool.register(block, prefix_hash)
            if prefix_hash not in self.hash_of.values():
                self.hash_of[block] = prefix_hash

    @rule(blocks=consumes(owners))
    def free(self, blocks: list[int]) -> None:
        self.pool.free(blocks)
        for block in blocks:
            self.users[block] -= 1
            self.clock += 1
            self.freed_at[block] = self.clock

    @precondition(lambda self: 0 in self.users)
    @rule()
    def free_twice(self) -> None:
        with pytest.raises(ValueError, match="is free already"):
            self.pool.free([self.users.index(0)])

    @invariant()
    def agrees_with_model(self) -> None:
        assert [self.pool.ref_count(block) for block in range(self.pool.num_blocks)] == self.users
        assert self.pool.num_free == self.users.count(0)
        found = {prefix_hash: self.pool.lookup(prefix_hash) for prefix_hash in (b"a", b"b", b"c")}
        assert {block: prefix_hash for prefix_hash, block in found.items() if block is not None} == self.hash_of


BLOCK_SIZE = 2
NUM_BLOCKS = 6
Written = tuple[str, tuple[int, ...]]
"""Tenant, and the tokens up to and including the one whose KV a slot holds: all that its KV depends on."""


class KVCacheMachine(RuleBasedStateMachine):
    """Requests that write their KV into the slots they were given, and must find it there as long as they hold them.

    With a window they hold those of the last tokens only.
    """

    requests = Bundle("requests")

    @initialize(prefix_caching=st.booleans(), window=st.none() | st.integers(1, 6))
    def create(self, prefix_caching: bool, window: int | None) -> None:
        self.kv, self.window = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE, prefix_caching, window), window
        self.num_returned: dict[Request, int] = {}
        """Of blocks that hold nothing the next token reads."""
        self.slots: dict[tuple[int, int], Written] = {}
        self.holders: list[Request] = []
        self.count = 0

    @rule(
        target=requests,
        tenant=st.sampled_from(["red", "blue"]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        wants_prompt_logits=st.booleans(),
        prefilled=st.booleans(),
    )
    def arrive(self, tenant: str, prompt: list[int], wants_prompt_logits: bool, prefilled: bool) -> Request:
        self.count += 1
        sampling = SamplingParams(max_tokens=9, seed=0, prompt_logprobs=1 if wants_prompt_logits else None)
        request = Request(str(self.count), b"", tenant, sampling, prompt)
        if prefilled:
            self.allocate(request, num_ahead=0, keep_free=0)
            self.compute(request, num_tokens=len(prompt), drafts=[])
        return request

    @rule(request=requests, num_ahead=st.integers(0, 3), keep_free=st.integers(0, 2))
    def allocate(self, request: Request, num_ahead: int, keep_free: int) -> None:
        """First admission, re-admission, or room to grow (``num_ahead`` drafts)."""
        is_new = request not in self.holders
        before = self.kv.num_used_blocks, list(request.block_ids)
        cached = self.kv.cached_blocks(request) if is_new else []
        num_new = self.kv.num_new_blocks(request) if is_new else 0
        allowed = self.kv.allocate(request, request.num_tokens + num_ahead, keep_free, cached)
        if not allowed:
            assert (self.kv.num_used_blocks, list(request.block_ids)) == before
            return
        assert self.kv.num_slots(request) >= request.num_tokens + num_ahead
        if self.kv.num_used_blocks > before[0]:
            assert NUM_BLOCKS - self.kv.num_used_blocks >= keep_free
        if is_new:
            if num_ahead == 0:
                assert self.kv.num_used_blocks == before[0] + num_new
            request.num_computed_tokens = len(cached) * BLOCK_SIZE
            assert request.num_computed_tokens < request.num_tokens
            self.holders.append(request)

    @rule(request=requests, num_tokens=st.integers(1, 4), drafts=st.lists(st.integers(0, 1), max_size=3))
    def compute(self, request: Request, num_tokens: int, drafts: list[int]) -> None:
        """One step: the next tokens and, at the end, drafts as far as there are slots; then one new token is kept."""
        if request not in self.holders or request.num_computed_tokens == request.num_tokens:
            return
        start = request.num_computed_tokens
        end = min(start + num_tokens, request.num_tokens, self.kv.num_slots(request))
        tokens = request.all_token_ids[:end]
        if end == request.num_tokens:
            tokens = (tokens + drafts)[: self.kv.num_slots(request)]
        for position in range(start, len(tokens)):
            self.slots[self.slot(request, position)] = request.tenant, tuple(tokens[: position + 1])
        request.num_computed_tokens = end
        if end == request.num_tokens:
            new_token = (sum(request.all_token_ids) + end) % 2
            request.output_token_ids.append(new_token)
            request.all_token_ids.append(new_token)
        self.kv.after_commit(request)
        if self.window is not None:
            self.num_returned[request] = max(request.num_computed_tokens - self.window + 1, 0) // BLOCK_SIZE

    @rule(request=requests)
    def trim(self, request: Request) -> None:
        if request in self.holders:
            num_slots = self.kv.num_slots(request)
            self.kv.trim(request)
            assert self.kv.num_slots(request) == min(num_slots, -(-request.num_tokens // BLOCK_SIZE) * BLOCK_SIZE)

    @rule(request=requests)
    def release(self, request: Request) -> None:
        """The end of the request, or preemption: ``allocate`` may take it in again."""
        self.kv.free(request)
        request.num_computed_tokens = 0
        self.num_returned.pop(request, None)
        if request in self.holders:
            self.holders.remove(request)

    @invariant()
    def computed_tokens_are_in_the_cache(self) -> None:
        """Sharing is right: each slot holds KV of this tenant's own tokens, whoever wrote it."""
        for request in self.holders:
            for position in range(self.num_returned.get(request, 0) * BLOCK_SIZE, request.num_computed_tokens):
                written = request.tenant, tuple(request.all_token_ids[: position + 1])
                assert self.slots[self.slot(request, position)] == written

    @invariant()
    def no_block_is_lost_or_free_in_use(self) -> None:
        held = {block for request in self.holders for block in self.held(request)}
        assert self.kv.num_used_blocks == len(held)
        assert held <= set(range(NUM_BLOCKS))
        for request in self.holders:
            blocks = self.held(request)
            assert len(set(blocks)) == len(blocks)

    @invariant()
    def a_tenants_blocks_are_counted_once(self) -> None:
        for tenant in ("red", "blue"):
            blocks = {block for r in self.holders if r.tenant == tenant for block in self.held(r)}
            assert self.kv.num_blocks_used_by(tenant) == len(blocks)

    @invariant()
    def blocks_are_shared_only_for_equal_prefixes_of_one_tenant(self) -> None:
        users: dict[int, set[Written]] = {}
        for request in self.holders:
            for index, block in enumerate(self.held(request), self.num_returned.get(request, 0)):
                prefix = request.tenant, tuple(request.all_token_ids[: (index + 1) * BLOCK_SIZE])
                users.setdefault(block, set()).add(prefix)
        assert all(len(prefixes) == 1 for prefixes in users.values())

    def held(self, request: Request) -> list[int]:
        return list(request.block_ids[self.num_returned.get(request, 0) :])

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE

    def teardown(self) -> None:
        if hasattr(self, "kv"):
            for request in self.holders:
                self.kv.free(request)
            assert self.kv.num_used_blocks == 0


TestBlockPool = BlockPoolMachine.TestCase
TestKVCacheManager = KVCacheMachine.TestCase
