"""Which requests wait and which run: who is admitted, and who gives way. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

from evospec.engine.fair_queue import FairQueue
from evospec.engine.kv_cache_manager import KVCacheManager
from evospec.engine.request import Request

MOST_CACHED_TOKENS = 65536
"""Tokens from the prefix cache with which a step admits no more requests: to look for them takes time, too."""
PROMPT_TOKEN_SERVICE = 1
"""Service of a prompt token as fairness counts it; an output token costs about twice as much (VTC, section 5.1)."""
TURN_TOKENS = 32
"""Output tokens after which a tenant's only running sequence has had its turn, if it is above the tenant's share."""


class Admission:
    """Moves requests between the waiting and the running, by their tenants' service and shares.

    Requests are admitted in the order of ``FairQueue`` while there is room for the whole prompt and a block
    for each running sequence to grow into. Where there is not, sequences of other tenants give way to a
    request that is next in line and entitled to room (``RunningSequences``), and nobody else is admitted
    until it is. One that is not entitled waits for room to become free, and lets entitled ones pass, since
    its tenant has others that run.

    A preempted sequence loses its blocks and waits at the front of its tenant's queue, with all its tokens,
    output included, to compute.

    Bound: a request of a tenant of which no other runs or waits is next in line after those that had as
    little service when it came. Each of these, and then itself, is admitted at the latest when all running
    prefills have ended and ``TURN_TOKENS`` more steps are done, because every sequence that may have to give
    way has had its turn then. A step computes at least ``LEAST_CHUNK / 2`` tokens of running prefills while
    there are as many. More tenants than places or blocks have to wait for sequences to end.

    Every request finishes, however many requests a fixed number of tenants sends: a tenant that gets no
    tokens is charged nothing, so it becomes the next in line, where nobody passes it, and is admitted.
    Before its oldest sequence has got a token, its own newer ones give way, those that have had their turns
    and, where there are none, those admitted later.
    """

    def __init__(self, kv: KVCacheManager, max_running: int) -> None:
        self._kv = kv
        self.waiting = FairQueue()
        self.running = RunningSequences(kv, max_running)
        self.preempted: list[Request] = []
        """In this step; their tenants get nothing more in it."""
        self.lacks_blocks = False
        """Whether, in this step, blocks are too few for those that run or for those that wait."""
        self._num_cached_tokens = 0
        """Of requests admitted in this step."""
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    def begin_step(self) -> None:
        """Forget about the last step."""
        self.preempted = []
        self.lacks_blocks = False
        self._num_cached_tokens = 0

    def grow(self, request: Request) -> None:
        """Give a running sequence blocks for all its tokens; others are preempted for that, or itself."""
        while request not in self.preempted and not self._kv.allocate(request, request.num_tokens):
            if not self._reclaim_draft_blocks():
                self.lacks_blocks = True
                self._preempt(self.running.to_let_others_grow())

    def admit_next_in_line(self, unfinished: Collection[str]) -> None:
        """Admit those next in line that are entitled to room, one for each tenant, also where others have to give way.

        ``unfinished``: tenants with a running prefill, who may have no second one.
        """
        if self._num_tenants() == 1:
            return
        seen = {*unfinished, *self._preempted_tenants()}
        while requests := [request for request in self.waiting.next_in_line() if request.tenant not in seen]:
            request = requests[0]
            seen.add(request.tenant)
            if not self._is_entitled(request):
                continue
            cached = self._kv.cached_blocks(request)
            while not self._start(request, cached, self.running.num_growing()):
                if self._reclaim_draft_blocks():
                    continue
                victim = self.running.to_make_room_for(request, self._num_tenants())
                if victim is None:
                    self.lacks_blocks = True
                    return
                self._preempt(victim)
                seen.add(victim.tenant)

    def admit(self, num_tokens: int, num_rows: int, whole: bool) -> dict[Request, int]:
        """Admit requests in order of fairness while there is room; returns the tokens to compute for each.

        Args:
            num_tokens: most tokens to compute for them in this step.
            num_rows: the same of prompts whose logits are wanted; where none are left, their tenants wait.
            whole: only prompts that fit in one chunk, which may overtake a long prefill because they leave no
                second unfinished one behind.
        """
        plan: dict[Request, int] = {}
        seen, only_entitled, num_growing = self._preempted_tenants(), False, self.running.num_growing()
        while num_tokens > 0 and not self.running.is_full and self._num_cached_tokens < MOST_CACHED_TOKENS:
            request = self.waiting.peek(seen)
            if request is None:
                break
            most = min(num_tokens, num_rows) if request.wants_prompt_logits else num_tokens
            cached = self._kv.cached_blocks(request)
            if whole and request.num_tokens - len(cached) * self._kv.block_size > most:
                break
            if most == 0:
                seen.add(request.tenant)
                continue
            if (not only_entitled or self._is_entitled(request)) and self._start(request, cached, num_growing):
                num_growing += 1
                plan[request] = min(self._kv.num_computable(request), most)
                num_tokens -= plan[request]
                num_rows -= plan[request] if request.wants_prompt_logits else 0
                continue
            self.lacks_blocks = only_entitled = True
            seen.add(request.tenant)
            if self._is_entitled(request):
                break
        return plan

    def _is_entitled(self, request: Request) -> bool:
        return self.running.is_entitled(request, self._num_tenants())

    def _preempted_tenants(self) -> set[str]:
        return {request.tenant for request in self.preempted}

    def _num_tenants(self) -> int:
        return len({*self.waiting.tenants, *self.running.tenants})

    def _start(self, request: Request, cached: Sequence[int], num_growing: int) -> bool:
        """Make a waiting request run, if there are a place and blocks for it, and one for each that grows."""
        if self.running.is_full:
            return False
        if not self._kv.allocate(request, request.num_tokens, num_growing, cached):
            return False
        num_cached = len(cached) * self._kv.block_size
        self._num_cached_tokens += num_cached
        self.waiting.take(request)
        request.num_computed_tokens = num_cached
        self.running.append(request)
        if request.num_preemptions == 0:
            request.all_token_ids = [*request.all_token_ids]  # its own from now on
            num_prompt = len(request.prompt_token_ids)
            request.num_cached_tokens, request.queue_seconds = num_cached, time.monotonic() - request.arrived_at
            self.waiting.charge(request.tenant, PROMPT_TOKEN_SERVICE * (num_prompt - num_cached))
            if self._kv.prefix_caching and not request.is_synthetic:
                self.prefix_query_tokens += num_prompt
                self.prefix_hit_tokens += num_cached
        return True

    def _reclaim_draft_blocks(self) -> bool:
        """Take back blocks that only rejected drafts used; whether there were any."""
        before = self._kv.num_used_blocks
        for request in self.running:
            self._kv.trim(request)
        return self._kv.num_used_blocks < before

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._kv.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.append_preempted(request)
        self.preempted.append(request)


class RunningSequences:
    """All sequences that run, in the order in which they were admitted last.

    With T tenants that run or wait, a tenant's share is 1/T of the places and 1/T of the KV blocks, at least
    one of each. A tenant holds the blocks that its sequences use, one that several share counted once, and a
    block more for each that has none to grow into: it will soon need it. A tenant of which nothing runs is
    entitled to one sequence, whatever that needs.

    A tenant's newest sequence gives way first. Its only one keeps its blocks for a turn, until it has
    ``TURN_TOKENS`` tokens more than when it was admitted, so that it has not been computed for nothing. A
    stalled one has no turn, since it might not end.
    """

    def __init__(self, kv: KVCacheManager, max_sequences: int) -> None:
        self._kv = kv
        self._max_sequences = max_sequences
        self._sequences: list[Request] = []
        self._of_tenants: dict[str, list[Request]] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._sequences)

    @property
    def is_full(self) -> bool:
        return len(self._sequences) >= self._max_sequences

    @property
    def tenants(self) -> Collection[str]:
        """Tenants of which a sequence runs."""
        return self._of_tenants.keys()

    def append(self, request: Request) -> None:
        """Add a sequence that has got its blocks."""
        request.num_output_at_admission = len(request.output_token_ids)
        self._sequences.append(request)
        self._of_tenants.setdefault(request.tenant, []).append(request)

    def remove(self, request: Request) -> None:
        """Take out a sequence; its blocks are not touched."""
        self._sequences.remove(request)
        of_tenant = self._of_tenants[request.tenant]
        of_tenant.remove(request)
        if not of_tenant:
            del self._of_tenants[request.tenant]

    def num_growing(self) -> int:
        """Blocks to keep free for those that run, or they would soon be preempted: one for each that has no spare."""
        return sum(not self._kv.can_grow(request) for request in self._sequences)

    def is_entitled(self, request: Request, num_tenants: int) -> bool:
        """Whether others have to give way to a waiting request: ``num_tenants`` run or wait, with its own."""
        num_sequences = self._num_sequences(request.tenant)
        if num_tenants == 1 or num_sequences == 0:
            return True
        if num_sequences >= self._max_sequences // num_tenants:
            return False
        needed = self._kv.num_new_blocks(request)
        return self._held_blocks(request.tenant) + needed <= self._kv.num_blocks // num_tenants

    def to_make_room_for(self, request: Request, num_tenants: int) -> Request | None:
        """The sequence that has to give way to an entitled request which lacks a place or blocks.

        It is the newest of the tenant that holds most of what lacks, among the other tenants above their share.
        To a request that needs more than its tenant's share, tenants within theirs give way as well. None while those
        that could have not had their turns yet.
        """
        if self.is_full:
            held, size, needed = self._num_sequences, self._max_sequences, 1
        else:
            held, size, needed = self._held_blocks, self._kv.num_blocks, self._kv.num_new_blocks(request)
        share = max(size // num_tenants, 1)
        is_large = held(request.tenant) + needed > share
        for tenant in sorted(self._of_tenants, key=held, reverse=True):
            is_above = held(tenant) > share
            if tenant != request.tenant and (is_above or is_large):
                newest = self._of_tenants[tenant][-1]
                if _has_had_turn(newest) or (is_above and self._num_sequences(tenant) > 1):
                    return newest
        return None

    def to_let_others_grow(self) -> Request:
        """The sequence that has to give way where one that runs lacks a block: of the tenant that holds most blocks.

        The one admitted last of all, where each tenant has one sequence and none has had its turn.
        """
        for tenant in sorted(self._of_tenants, key=self._kv.num_blocks_used_by, reverse=True):
            newest = self._of_tenants[tenant][-1]
            if self._num_sequences(tenant) > 1 or _has_had_turn(newest):
                return newest
        return self._sequences[-1]

    def _num_sequences(self, tenant: str) -> int:
        return len(self._of_tenants.get(tenant, ()))

    def _held_blocks(self, tenant: str) -> int:
        num_growing = sum(not self._kv.can_grow(request) for request in self._of_tenants.get(tenant, ()))
        return self._kv.num_blocks_used_by(tenant) + num_growing


def _has_had_turn(request: Request) -> bool:
    return request.is_stalled or len(request.output_token_ids) - request.num_output_at_admission >= TURN_TOKENS
