"""Which requests wait and which run: who is admitted, and who gives way. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from engine.fair_queue import FairQueue
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request
from engine.running import RunningSequences

MOST_CACHED_TOKENS = 65536
"""Tokens from the prefix cache with which a step admits no more requests: to look for them takes time, too."""
PROMPT_TOKEN_SERVICE = 1
"""Service of a prompt token as fairness counts it; an output token costs about twice as much (VTC, section 5.1)."""


class Admission:
    """Moves requests between the waiting and the running, by their tenants' service and shares.

    Requests are admitted in the order of ``FairQueue`` while there is room for the whole prompt and a block
    for each running sequence to grow into. Where there is not, sequences of other tenants give way to a
    request that is next in line and entitled to room (``RunningSequences``), and nobody else is admitted
    until it is. One that is not entitled waits for room to become free, and lets entitled ones pass, since
    its tenant has others that run.

    A step that has admitted requests with ``MOST_CACHED_TOKENS`` cached tokens leaves the others to the next one.

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

        Args:
            unfinished: tenants with a running prefill: they may have no second one.
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
        request.draft_token_ids = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.append_preempted(request)
        self.preempted.append(request)
