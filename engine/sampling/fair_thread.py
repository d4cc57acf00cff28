"""One thread in which tenants take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class FairThread(Generic[T]):
    """Computes what futures promise, one at a time, for each tenant in the order of its submissions.

    A tenant that has submitted much thus keeps another's first one waiting for one or two of its own, not for all.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[Future[T], Callable[[], T]]] = {}
        """By tenant; the first's turn is next."""

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
            while self._waiting:
                tenant = next(iter(self._waiting))
                queue = self._waiting.pop(tenant)
                future = next(iter(queue))
                compute = queue.pop(future)
                if queue:
                    self._waiting[tenant] = queue  # behind the others
                if not future.done():
                    return future, compute
        return None
