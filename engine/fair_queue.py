"""Waiting requests, and whose turn it is."""

from __future__ import annotations

from collections import deque

from engine.request import Request


class FairQueue:
    """A FIFO queue for each tenant; the tenant with the least service so far is next.

    Service is counted in weighted tokens by ``charge``. A tenant whose queue was empty is lifted to
    the least service of those that wait, or of the last one served if none does, so that idle time
    earns no credit. This is the virtual token counter (VTC) of Sheng et al., "Fairness in Serving
    Large Language Models", OSDI 2024.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Request]] = {}
        self._service: dict[str, int] = {}
        self._last_served = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def waiting_by_tenant(self) -> dict[str, int]:
        """Requests waiting, for each tenant that has any."""
        return {tenant: len(queue) for tenant, queue in self._queues.items()}

    def append(self, request: Request) -> None:
        """Put a new request at the end of its tenant's queue."""
        self._queue_of(request.tenant).append(request)
        self._length += 1

    def append_left(self, request: Request) -> None:
        """Put a preempted request at the front of its tenant's queue."""
        self._queue_of(request.tenant).appendleft(request)
        self._length += 1

    def peek(self) -> Request | None:
        """The request whose turn it is."""
        if not self._queues:
            return None
        return self._queues[min(self._queues, key=self._service.__getitem__)][0]

    def remove(self, request: Request) -> None:
        """Take out a waiting request.

        Raises:
            ValueError: it does not wait.
        """
        queue = self._queues.get(request.tenant, deque())
        queue.remove(request)
        self._length -= 1
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
        self._last_served = self._service[request.tenant]
        self.remove(request)
        return request

    def charge(self, tenant: str, service: int) -> None:
        """Count service given to a tenant that has queued before."""
        self._service[tenant] += service

    def _queue_of(self, tenant: str) -> deque[Request]:
        queue = self._queues.get(tenant)
        if queue is None:
            floor = min((self._service[other] for other in self._queues), default=self._last_served)
            self._service[tenant] = max(self._service.get(tenant, 0), floor)
            queue = self._queues[tenant] = deque()
        return queue
