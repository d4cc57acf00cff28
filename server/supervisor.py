"""Child processes that are started again when they die, and never outlive their parent."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog
from prometheus_client import Counter

log = structlog.get_logger(__name__)

RESTARTS = Counter("evospec:process_restarts", "Child processes started again after they died.", ["process"])

_FIRST_DELAY = 0.5
_LONGEST_DELAY = 30.0
_HEALTHY_AFTER = 60.0
_PR_SET_PDEATHSIG = 1


class ProcessFailed(Exception):
    """A child process died before it was ever ready; the message says what it was and how it ended."""


class SupervisedProcess:
    """One child process. ``run`` starts it and starts it again, with growing delays, until cancelled.

    The child has its own session, so Ctrl-C in a terminal reaches the parent only, which then decides.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        wait_ready: Callable[[], Awaitable[None]],
        log_path: Path | None = None,
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._environment = environment
        self._wait_ready = wait_ready
        self._log_path = log_path
        self._process: asyncio.subprocess.Process | None = None
        RESTARTS.labels(name)  # shown as 0 from the start

    @property
    def pid(self) -> int:
        """Process id of the child started last."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    async def start(self) -> None:
        """Start it for the first time and wait until it is ready; raises ``ProcessFailed`` if it dies before."""
        process = await self._spawn()
        died = asyncio.ensure_future(process.wait())
        ready = asyncio.ensure_future(self._wait_ready())
        try:
            await asyncio.wait({died, ready}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                ended = f"{_describe(died.result())}{self._last_words()}"
                raise ProcessFailed(f"the {self.name} process ended before it was ready ({ended})")
            await ready
        finally:
            died.cancel()
            ready.cancel()

    async def keep_alive(self) -> None:
        """Start it again whenever it ends; returns only by cancellation."""
        assert self._process is not None, "start() comes first"
        clock = asyncio.get_running_loop().time
        delay = _FIRST_DELAY
        while True:
            started = clock()
            code = await self._process.wait()
            if clock() - started > _HEALTHY_AFTER:
                delay = _FIRST_DELAY
            log.error("process died", process=self.name, ended=_describe(code), restart_in=delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)
            RESTARTS.labels(self.name).inc()
            await self._spawn()

    async def stop(self, grace: float) -> None:
        """SIGTERM, then SIGKILL after ``grace`` seconds (0: SIGKILL at once)."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        if grace > 0:
            process.terminate()
            try:
                async with asyncio.timeout(grace):
                    await process.wait()
                    return
            except TimeoutError:
                log.warning("process did not stop in time", process=self.name)
        process.kill()
        await process.wait()

    def _last_words(self) -> str:
        """The last line of its log file, if it has one; other children log to our standard error."""
        if self._log_path is None or not self._log_path.exists():
            return ""
        lines = self._log_path.read_text(errors="replace").splitlines()
        return f": {lines[-1]}" if lines else ""

    async def _spawn(self) -> asyncio.subprocess.Process:
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
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
