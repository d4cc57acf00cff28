"""The CPU work of requests that would keep the event loop: in threads, where tenants take turns by bytes."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from starlette.types import Receive

from evospec.server.sse import run_until_disconnect

T = TypeVar("T")
JobT = TypeVar("JobT")
P = ParamSpec("P")

SMALL = 4096
"""Bytes of work that is done at once: a thread would take longer to start with it."""
_THREADS = 2
"""One tenant has at most one of them, so another's job starts at once as long as only one has long ones."""


@dataclass
class _Tenant(Generic[JobT]):
    service: int = 0
    jobs: deque[tuple[int, JobT]] = field(default_factory=deque)
    is_running: bool = False

    @property
    def is_active(self) -> bool:
        return bool(self.jobs) or self.is_running


class Turns(Generic[JobT]):
    """A queue for each tenant, each with at most one job running; the tenant with the least service is next.

    Service is the bytes of the jobs that were taken. A tenant that comes with nothing waiting or running has at least
    the least service of the tenants that have: to have been idle earns nothing. Tenants that have nothing are
    forgotten once nobody has anything.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[JobT]] = {}

    def add(self, tenant: str, size: int, job: JobT) -> None:
        """Let a job of ``size`` bytes wait behind the tenant's other jobs."""
        state = self._tenants.setdefault(tenant, _Tenant())
        if not state.is_active:
            floor = min((other.service for other in self._tenants.values() if other.is_active), default=0)
            state.service = max(floor, state.service)
        state.jobs.append((size, job))

    def remove(self, tenant: str, job: JobT) -> None:
        """Take out a job that may still wait; one that runs or has ended stays as it is."""
        if (state := self._tenants.get(tenant)) is not None:
            state.jobs = deque(waiting for waiting in state.jobs if waiting[1] is not job)
        self._forget()

    def take(self) -> tuple[str, JobT] | None:
        """The next job and its tenant, which runs until ``done``; None if no tenant may run one."""
        ready = [name for name, state in self._tenants.items() if state.jobs and not state.is_running]
        if not ready:
            return None
        tenant = min(ready, key=lambda name: self._tenants[name].service)
        state = self._tenants[tenant]
        size, job = state.jobs.popleft()
        state.service += size
        state.is_running = True
        return tenant, job

    def done(self, tenant: str) -> None:
        self._tenants[tenant].is_running = False
        self._forget()

    def _forget(self) -> None:
        if not any(state.is_active for state in self._tenants.values()):
            self._tenants.clear()


@dataclass(frozen=True, eq=False)
class _Job:
    work: Callable[[], Any]
    result: asyncio.Future[Any]


class WorkShares:
    """Runs work in threads: one job of a tenant at a time, tenants by turns of bytes.

        shares = WorkShares()
        text = await shares.run("acme", len(body), decode, body)

    What holds the interpreter's lock must be bounded: it stops the event loop from any thread.
    """

    def __init__(self) -> None:
        self._turns: Turns[_Job] = Turns()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="work")
        self._num_free = _THREADS

    async def run(self, tenant: str, size: int, function: Callable[..., T], *arguments: Any) -> T:
        """The result of ``function(*arguments)``, whose work is about that of ``size`` bytes of text.

        A caller that is cancelled leaves the queue at once; a job that runs is finished in any case.
        """
        if size <= SMALL:
            return function(*arguments)
        context = contextvars.copy_context()
        job = _Job(partial(context.run, function, *arguments), asyncio.get_running_loop().create_future())
        self._turns.add(tenant, size, job)
        self._start()
        try:
            result: T = await job.result
        except asyncio.CancelledError:
            self._turns.remove(tenant, job)
            raise
        return result

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Start jobs as long as a thread is free and a tenant may have it."""
        while self._num_free and (turn := self._turns.take()) is not None:
            tenant, job = turn
            self._num_free -= 1
            running = asyncio.get_running_loop().run_in_executor(self._threads, job.work)
            running.add_done_callback(partial(self._finish, tenant, job))

    def _finish(self, tenant: str, job: _Job, running: asyncio.Future[Any]) -> None:
        self._num_free += 1
        self._turns.done(tenant)
        if running.cancelled():
            job.result.cancel()
            return  # ``close``
        error = running.exception()
        if not job.result.done():  # else its caller was cancelled
            job.result.set_result(running.result()) if error is None else job.result.set_exception(error)
        self._start()


@dataclass(frozen=True)
class RequestWork:
    """The work of one request whose body, ``size`` bytes, has been read."""

    shares: WorkShares
    tenant: str
    size: int
    receive: Receive

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of work on the body; raises ``ClientDisconnected`` once the client has gone away."""
        if self.size <= SMALL:
            return function(*args, **kwargs)
        job = self.shares.run(self.tenant, self.size, partial(function, *args, **kwargs))
        return await run_until_disconnect(self.receive, job)
