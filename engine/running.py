"""The sequences that run, what is their tenants' share, and which of them give way. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from engine.kv_cache_manager import KVCacheManager
from engine.request import Request

TURN_TOKENS = 32
"""Output tokens after which a tenant's only running sequence has had its turn, if it is above the tenant's share."""


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
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._sequences)

    @property
    def is_full(self) -> bool:
        """Whether all places are taken."""
        return len(self._sequences) >= self._max_sequences

    @property
    def tenants(self) -> Collection[str]:
        """Tenants of which a sequence runs."""
        return self._counts.keys()

    def append(self, request: Request) -> None:
        """Add a sequence that has got its blocks."""
        request.num_output_at_admission = len(request.output_token_ids)
        self._sequences.append(request)
        self._counts[request.tenant] += 1

    def remove(self, request: Request) -> None:
        """Take out a sequence; its blocks are not touched.

        Raises:
            ValueError: it does not run.
        """
        self._sequences.remove(request)
        self._counts[request.tenant] -= 1
        if not self._counts[request.tenant]:
            del self._counts[request.tenant]

    def num_growing(self) -> int:
        """Blocks to keep free for those that run, or they would soon be preempted: one for each that has no spare."""
        return sum(not self._kv.can_grow(request) for request in self._sequences)

    def is_entitled(self, request: Request, num_tenants: int) -> bool:
        """Whether others have to give way to a waiting request: ``num_tenants`` run or wait, with its own."""
        count = self._counts[request.tenant]
        if num_tenants == 1 or count == 0:
            return True
        if count >= self._max_sequences // num_tenants:
            return False
        needed = self._kv.num_new_blocks(request)
        return self._held_blocks()[request.tenant] + needed <= self._kv.num_blocks // num_tenants

    def to_make_room_for(self, request: Request, num_tenants: int) -> Request | None:
        """The sequence that has to give way to an entitled request which lacks a place or blocks.

        It is the newest of the tenant that holds most of what lacks, among the other tenants above their share.
        To a request that needs more than its tenant's share, tenants within theirs give way as well.

        Returns:
            None while nobody has to: the sequences that could have not had their turns yet.
        """
        if self.is_full:
            held, share, needed = self._counts, max(self._max_sequences // num_tenants, 1), 1
        else:
            held, share = self._held_blocks(), max(self._kv.num_blocks // num_tenants, 1)
            needed = self._kv.num_new_blocks(request)
        is_large = held[request.tenant] + needed > share
        for tenant, amount in held.most_common():
            if tenant != request.tenant and (amount > share or is_large):
                newest = self._newest(tenant)
                if _has_had_turn(newest) or (amount > share and self._counts[tenant] > 1):
                    return newest
        return None

    def to_let_others_grow(self) -> Request:
        """The sequence that has to give way where one that runs lacks a block: of the tenant that holds most blocks.

        The one admitted last of all, where each tenant has one sequence and none has had its turn.
        """
        for tenant in sorted(self._counts, key=self._kv.num_blocks_used_by, reverse=True):
            newest = self._newest(tenant)
            if self._counts[tenant] > 1 or _has_had_turn(newest):
                return newest
        return self._sequences[-1]

    def _held_blocks(self) -> Counter[str]:
        held = Counter({tenant: self._kv.num_blocks_used_by(tenant) for tenant in self._counts})
        held.update(request.tenant for request in self._sequences if not self._kv.can_grow(request))
        return held

    def _newest(self, tenant: str) -> Request:
        return next(request for request in reversed(self._sequences) if request.tenant == tenant)


def _has_had_turn(request: Request) -> bool:
    return request.is_stalled or len(request.output_token_ids) - request.num_output_at_admission >= TURN_TOKENS
