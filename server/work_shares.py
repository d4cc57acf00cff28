"""The CPU work of requests that would keep the event loop: in threads, where tenants take turns."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

from starlette.types import Receive

from server.sse import run_until_disconnect
from server.turns import Turns

T = TypeVar("T")
P = ParamSpec("P")

SMALL = 4096
"""Bytes of work that is done at once: a thread would take longer to start with it."""
_THREADS = 2
"""One tenant has at most one of them, so another's job starts at once as long as only one has long ones."""


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
        """Take no further work."""
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
