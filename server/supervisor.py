"""Child processes that are started again when they die, and never outlive their parent."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import Counter

log = structlog.get_logger(__name__)

RESTARTS = Counter("evospec:process_restarts", "Child processes started again after they died.", ["process"])
HANGS = Counter("evospec:process_hangs", "Child processes killed because they were silent.", ["process"])

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
_HEALTHY_AFTER = 60.0
_STARTS = 4
_PR_SET_PDEATHSIG = 1


class ProcessFailed(Exception):
    """A child process died before it was ever ready, or must not be started again; the message says why."""


class SupervisedProcess:
    """One child process, which ``keep_alive`` starts again, with growing delays, until cancelled.

    ``wait_ready`` returns when the process serves. None: nobody waits for that, and ``keep_alive`` starts it, once
    ``wait_before`` returns.
    ``last_sign``: when it last gave a sign of life (``time.monotonic``). It counts as hanging after ``timeout`` seconds
    of silence. Its first start may take as long as it needs, to fetch and compile; once that has been done, a start may
    take ``_STARTS`` times as long as a silence.
    ``fatal``: exit codes after which it is not started again, with the reason.

    The child has its own session, so Ctrl-C in a terminal reaches the parent only, which then decides.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        wait_ready: Callable[[], Awaitable[None]] | None,
        log_path: Path | None = None,
        last_sign: Callable[[], float] | None = None,
        timeout: float = math.inf,
        fatal: Mapping[int, str] | None = None,
        wait_before: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._environment = environment
        self._wait_ready = wait_ready
        self._wait_before = wait_before
        self._log_path = log_path
        self._last_sign, self._timeout = last_sign, timeout
        self._fatal = fatal or {}
        self._started = 0.0
        self._process: asyncio.subprocess.Process | None = None
        RESTARTS.labels(name)  # shown as 0 from the start
        HANGS.labels(name)

    @property
    def pid(self) -> int:
        """Process id of the child started last."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the child started last has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it for the first time and wait until it is ready; raises ``ProcessFailed`` if it dies before.

        Nothing is done where nobody waits for it.
        """
        if self._wait_ready is None:
            return
        process = await self._spawn()
        died = asyncio.ensure_future(process.wait())
        ready = asyncio.ensure_future(self._wait_ready())
        try:
            await asyncio.wait({died, ready}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                code = died.result()
                ended = f"the {self.name} process ended before it was ready ({_describe(code)}{self._last_words()})"
                raise ProcessFailed(self._fatal.get(code, ended))
            await ready
        finally:
            died.cancel()
            ready.cancel()

    async def keep_alive(self) -> None:
        """Start it again whenever it ends or hangs, until cancelled; raises ``ProcessFailed`` for a fatal exit code."""
        delay = _FIRST_DELAY
        if self._wait_before is not None:
            await self._wait_before()
            delay = await self._start_again(0)
        while True:
            code = await self._wait()
            if code in self._fatal:
                raise ProcessFailed(self._fatal[code])
            if time.monotonic() - self._started > _HEALTHY_AFTER:
                delay = _FIRST_DELAY
            log.error("process died", process=self.name, ended=_describe(code), restart_in=delay)
            delay = await self._start_again(delay)

    async def _start_again(self, delay: float) -> float:
        """Wait ``delay`` seconds and start it, for the first time or once more; the delay before the next time.

        A machine without memory or process ids to spare, or a program that is being replaced, fails the start itself.
        That is tried again too: the other processes serve meanwhile.
        """
        while True:
            await asyncio.sleep(delay)
            delay = min(max(2 * delay, _FIRST_DELAY), _LONGEST_DELAY)
            is_first = self._process is None
            try:
                await self._spawn()
            except OSError as error:
                log.error("process cannot be started", process=self.name, error=str(error), restart_in=delay)
            else:
                RESTARTS.labels(self.name).inc(not is_first)
                return delay

    async def _wait(self) -> int:
        """Its exit code once it has ended; kills it if it hangs."""
        assert self._process is not None, "start() comes first"
        ended = asyncio.ensure_future(self._process.wait())
        tasks: list[asyncio.Future[Any]] = [ended]
        if self._last_sign is not None:
            tasks.append(asyncio.ensure_future(self._wait_until_silent(self._last_sign)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                log.error("process hangs", process=self.name, pid=self.pid)
                HANGS.labels(self.name).inc()
                self._kill(self._process)
            return await ended
        finally:
            for task in tasks:
                task.cancel()

    async def _wait_until_silent(self, last_sign: Callable[[], float]) -> None:
        """Only a second look counts: if it was this process that stood still, the signs are there but not yet read."""
        looks = 0
        while looks < 2:
            await asyncio.sleep(self._timeout / 8)
            is_started, silence = last_sign() > self._started, time.monotonic() - max(last_sign(), self._started)
            hangs = silence > self._timeout * (1 if is_started else _STARTS)
            looks = looks + 1 if hangs else 0

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after ``grace`` seconds (0: SIGKILL at once)."""
        process = self._process
        if process is None or not self.is_running:
            return
        if grace > 0:
            process.terminate()
            try:
                async with asyncio.timeout(grace):
                    await process.wait()
                    return
            except TimeoutError:
                log.warning("process did not stop in time", process=self.name)
        self._kill(process)
        await process.wait()

    @staticmethod
    def _kill(process: asyncio.subprocess.Process) -> None:
        """And what it has started, such as compilers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        """The last line of its log file, if it has one; other children log to our standard error."""
        if self._log_path is None or not self._log_path.exists():
            return ""
        lines = self._log_path.read_text(errors="replace").splitlines()
        return f": {lines[-1]}" if lines else ""

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._started = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            env=dict(self._environment),  # uvloop takes nothing but a dict
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        log.info("process started", process=self.name, pid=self._process.pid)
        return self._process


# Loaded here because a forked child must not import or load anything before it executes its program.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however that dies (Linux only)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    names: dict[int, str] = {number: number.name for number in signal.Signals}  # most real-time signals have none
    return f"killed by {names.get(-code, f'signal {-code}')}"
