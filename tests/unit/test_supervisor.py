"""What the supervisor says of a child that has ended, and what it ends with one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from evospec.server.supervisor import ProcessFailed, SupervisedProcess


@pytest.mark.parametrize(
    ("last_act", "ended"),
    [
        ("sys.exit(3)", "exit code 3"),
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed by SIGKILL"),
        (f"os.kill(os.getpid(), {signal.SIGRTMIN + 1})", f"killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
async def test_a_child_that_ends_before_it_is_ready_is_described(last_act: str, ended: str) -> None:
    """Signals without a name, too."""
    program = [sys.executable, "-c", f"import os, sys; {last_act}"]
    child = SupervisedProcess("child", program, os.environ, lambda: asyncio.sleep(60))
    with pytest.raises(ProcessFailed, match=rf"before it was ready \({ended}\)"):
        await child.start()


async def test_what_a_child_has_started_is_killed_with_it(tmp_path: Path) -> None:
    """A compiler that goes on would write where that of the next child writes."""
    started = tmp_path / "started"
    sleeper = "import time; time.sleep(600)"
    program = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {sleeper!r}])
pathlib.Path({str(tmp_path / "new")!r}).write_text(str(process.pid))
pathlib.Path({str(tmp_path / "new")!r}).rename({str(started)!r})
time.sleep(600)
"""

    def wait() -> None:
        while not started.exists():
            time.sleep(0.01)

    child = SupervisedProcess("child", [sys.executable, "-c", program], os.environ, lambda: asyncio.to_thread(wait))
    await child.start()
    compiler = psutil.Process(int(started.read_text()))
    await child.stop(0)
    compiler.wait(timeout=60)


async def test_a_child_that_hangs_while_it_starts_again_is_killed() -> None:
    """It never gives a sign: the last one was of the child before it."""
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    before = time.monotonic()
    child = SupervisedProcess("child", program, os.environ, None, last_sign=lambda: before, timeout=0.1)
    async with asyncio.timeout(60):
        await child._start_again(0)
        assert await child._wait() == -signal.SIGKILL
