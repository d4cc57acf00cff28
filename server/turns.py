"""Whose job is next: tenants take turns by the bytes of the jobs they were given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

JobT = TypeVar("JobT")


@dataclass
class _Tenant(Generic[JobT]):
    service: int
    jobs: deque[tuple[int, JobT]] = field(default_factory=deque)
    is_running: bool = False


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
        if not self._is_active(tenant):
            floor = min((self._tenants[other].service for other in self._active()), default=0)
            known = self._tenants.get(tenant)
            self._tenants[tenant] = _Tenant(max(floor, known.service if known else 0))
        self._tenants[tenant].jobs.append((size, job))

    def remove(self, tenant: str, job: JobT) -> None:
        """Take out a job that may still wait; one that runs or has ended stays as it is."""
        state = self._tenants.get(tenant)
        if state is not None:
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
        """The tenant's job has ended."""
        self._tenants[tenant].is_running = False
        self._forget()

    def _is_active(self, tenant: str) -> bool:
        state = self._tenants.get(tenant)
        return state is not None and (bool(state.jobs) or state.is_running)

    def _active(self) -> list[str]:
        return [tenant for tenant in self._tenants if self._is_active(tenant)]

    def _forget(self) -> None:
        if not self._active():
            self._tenants.clear()
