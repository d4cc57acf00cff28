"""The sequences that run, what is their tenants' share, and which of them give way. Imports no torch."""

from __future__ import annotations

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
        self._of_tenants: dict[str, list[Request]] = {}

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
        return self._of_tenants.keys()

    def append(self, request: Request) -> None:
        """Add a sequence that has got its blocks."""
        request.num_output_at_admission = len(request.output_token_ids)
        self._sequences.append(request)
        self._of_tenants.setdefault(request.tenant, []).append(request)

    def remove(self, request: Request) -> None:
        """Take out a sequence; its blocks are not touched.

        Raises:
            ValueError: it does not run.
        """
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
        To a request that needs more than its tenant's share, tenants within theirs give way as well.

        Returns:
            None while nobody has to: the sequences that could have not had their turns yet.
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
