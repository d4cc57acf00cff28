"""One thread in which tenants take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class FairThread(Generic[T]):
    """Computes what futures promise, one at a time, for each tenant in the order of its submissions.

    A tenant that has submitted much thus keeps another's first one waiting for one of its own, not for all.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[Future[T], Callable[[], T]]] = {}
        """By tenant; the first's turn is next."""
        self._served = ""
        """The tenant who had the latest turn."""

    def submit(self, tenant: str, future: Future[T], compute: Callable[[], T]) -> None:
        """Compute ``future``, unless it is cancelled first.

        Another tenant that wants the same submits it too: it is computed once, at the turn that comes first.
        """
        with self._lock:
            self._waiting.setdefault(tenant, {})[future] = compute
        self._thread.submit(self._compute_next)

    def _compute_next(self) -> None:
        taken = self._take()
        if taken is None:
            return
        future, compute = taken
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = compute()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _take(self) -> tuple[Future[T], Callable[[], T]] | None:
        """The next that still has to be computed; None where another tenant's turn has seen to all."""
        with self._lock:
            if self._served in self._waiting:  # now behind those who came meanwhile
                self._waiting[self._served] = self._waiting.pop(self._served)
            while self._waiting:
                tenant, queue = next(iter(self._waiting.items()))
                future = next(iter(queue))
                compute = queue.pop(future)
                if not queue:
                    del self._waiting[tenant]
                if not future.done():
                    self._served = tenant
                    return future, compute
        return None
