"""Waiting requests, and whose turn it is."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection

from engine.request import Request


def equal_share(size: int, tenants: Collection[str], newcomer: str) -> int:
    """What each of some tenants may have of ``size`` places, ``newcomer`` included; at least one."""
    return max(1, size // len({*tenants, newcomer}))


class FairQueue:
    """A FIFO queue for each tenant; the tenant with the least service so far is next.

    Service is counted in weighted tokens by ``charge``. A tenant whose queue was empty is lifted to
    the least service of those that wait, or of the last one served if none does, so that idle time
    earns no credit. This is the virtual token counter (VTC) of Sheng et al., "Fairness in Serving
    Large Language Models", OSDI 2024.

    Preempted requests come before all others: their turn has been before, and behind an endless row
    of new tenants it might not come again.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Request]] = {}
        self._preempted: deque[Request] = deque()
        self._service: dict[str, int] = {}
        self._last_tenant = ""
        """Whose turn came last; nobody's at first."""

    def __len__(self) -> int:
        return len(self._preempted) + sum(map(len, self._queues.values()))

    def waiting_by_tenant(self) -> dict[str, int]:
        """Requests waiting, for each tenant that has any."""
        counts = Counter(request.tenant for request in self._preempted)
        counts.update({tenant: len(queue) for tenant, queue in self._queues.items()})
        return dict(counts)

    def has_share(self, tenant: str, size: int) -> bool:
        """Whether a tenant waits with as much as an equal share of ``size``, among all that wait and itself."""
        return len(self._queues.get(tenant, ())) >= equal_share(size, self._queues, tenant)

    def append(self, request: Request) -> None:
        """Put a new request at the end of its tenant's queue."""
        if request.tenant not in self._queues:
            # What the last one was charged since then counts as well: its requests may still run.
            of_last = self._service.get(self._last_tenant, 0)
            floor = min((self._service[tenant] for tenant in self._queues), default=of_last)
            self._service[request.tenant] = max(self._service.get(request.tenant, 0), floor)
            self._queues[request.tenant] = deque()
        self._queues[request.tenant].append(request)

    def append_preempted(self, request: Request) -> None:
        """Put a preempted request before all others."""
        self._preempted.appendleft(request)

    def peek(self) -> Request | None:
        """The request whose turn it is."""
        if self._preempted:
            return self._preempted[0]
        if self._queues:
            return self._queues[min(self._queues, key=self._service.__getitem__)][0]
        return None

    def remove(self, request: Request) -> None:
        """Take out a waiting request.

        Raises:
            KeyError: it does not wait.
        """
        if request in self._preempted:
            self._preempted.remove(request)
            return
        queue = self._queues[request.tenant]
        queue.remove(request)
        if not queue:
            del self._queues[request.tenant]

    def pop(self) -> Request:
        """Take out the request whose turn it is.

        Raises:
            IndexError: nobody waits.
        """
        request = self.peek()
        if request is None:
            raise IndexError("nobody waits")
        if not self._preempted:
            self._last_tenant = request.tenant
        self.remove(request)
        return request

    def charge(self, tenant: str, service: int) -> None:
        """Count service given to a tenant that has queued before."""
        self._service[tenant] += service
