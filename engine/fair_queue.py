"""Waiting requests, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from evospec.engine.request import Request


def equal_share(size: int, tenants: Collection[str], newcomer: str) -> int:
    """What each of some tenants may have of ``size`` places, ``newcomer`` included; at least one."""
    return max(1, size // len({*tenants, newcomer}))


class FairQueue:
    """A FIFO queue for each tenant; the tenant with the least service so far is next.

    Service is counted in weighted tokens by ``charge``. A tenant whose queue was empty is lifted to
    the least service of those that wait, or of the last one served if none does, so that idle time
    earns no credit. A tenant of which nothing ran either starts from there, and owes nothing from before.
    This is the virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models",
    OSDI 2024, but for what is owed. A stalled request is passed over as long as it is.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Request]] = {}
        self._service: dict[str, int] = {}
        self._last_tenant = ""
        """Whose turn came last; nobody's at first."""

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def tenants(self) -> Collection[str]:
        """Tenants of which a request waits."""
        return self._queues.keys()

    def waiting_by_tenant(self) -> dict[str, int]:
        return {tenant: len(queue) for tenant, queue in self._queues.items()}

    def has_share(self, tenant: str, size: int) -> bool:
        """Whether a tenant waits with as much as an equal share of ``size``, among all that wait and itself."""
        return len(self._queues.get(tenant, ())) >= equal_share(size, self._queues, tenant)

    def append(self, request: Request, is_idle: bool) -> None:
        """Put a new request at the end of its tenant's queue.

        ``is_idle``: nothing of its tenant runs; if nothing waits either, it owes nothing from before.
        """
        if is_idle and request.tenant not in self._queues:
            self._service.pop(request.tenant, None)
        self._queue(request.tenant).append(request)

    def append_preempted(self, request: Request) -> None:
        """Put a preempted request before all others of its tenant."""
        self._queue(request.tenant).appendleft(request)

    def peek(self, passed_over: Collection[str] = ()) -> Request | None:
        """The request whose turn it is, leaving out the tenants ``passed_over``."""
        ready = [request for request in self._ready() if request.tenant not in passed_over]
        return min(ready, key=lambda request: self._service[request.tenant], default=None)

    def next_in_line(self) -> list[Request]:
        """The first request of each tenant that no other one is before."""
        ready = self._ready()
        least = min((self._service[request.tenant] for request in ready), default=0)
        return [request for request in ready if self._service[request.tenant] == least]

    def remove(self, request: Request) -> None:
        """Take out a waiting request; ``KeyError`` or ``ValueError`` if it does not wait."""
        queue = self._queues[request.tenant]
        queue.remove(request)
        if not queue:
            del self._queues[request.tenant]

    def take(self, request: Request) -> None:
        """Take out a request because its turn has come."""
        self.remove(request)
        self._last_tenant = request.tenant

    def charge(self, tenant: str, service: int) -> None:
        """Count service given to a tenant that has queued before."""
        self._service[tenant] += service

    def _ready(self) -> list[Request]:
        """The first request of each tenant that is not stalled."""
        queues = self._queues.values()
        firsts = (next((request for request in queue if not request.is_stalled), None) for queue in queues)
        return [request for request in firsts if request is not None]

    def _queue(self, tenant: str) -> deque[Request]:
        """The tenant's queue; if it has none, an empty one, and no credit for the time without."""
        if tenant not in self._queues:
            # What the last one was charged since then counts as well: its requests may still run.
            of_last = self._service.get(self._last_tenant, 0)
            floor = min((self._service[other] for other in self._queues), default=of_last)
            self._service[tenant] = max(self._service.get(tenant, 0), floor)
            self._queues[tenant] = deque()
        return self._queues[tenant]
