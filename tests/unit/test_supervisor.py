"""What the supervisor says of a child that has ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from server.supervisor import ProcessFailed, SupervisedProcess


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
