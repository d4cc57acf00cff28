"""The embedded Valkey: private, in memory, restarted, gone with its parent."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from evospec.server.options import RedisConfig
from evospec.server.processes import embedded_valkey, valkey_url
from evospec.server.redis_gate import RedisGate, RedisUnavailable
from evospec.server.supervisor import ProcessFailed, SupervisedProcess
from tests.running_valkey import running_valkey


async def until_answered(gate: RedisGate) -> None:
    """Wait for ``gate`` to reach Redis."""
    async with asyncio.timeout(30):
        while True:
            try:
                await gate.run(gate.redis.ping())
                return
            except RedisUnavailable:
                await asyncio.sleep(0.05)


async def test_socket_is_private_and_nothing_is_stored(tmp_path: Path) -> None:
    async with running_valkey(tmp_path):
        redis = Redis.from_url(valkey_url(tmp_path))
        await redis.set("key", "value")
        assert await redis.config_get("port", "save", "appendonly") == {"port": "0", "save": "", "appendonly": "no"}
        await redis.aclose()
        assert stat.S_IMODE((tmp_path / "valkey.sock").stat().st_mode) == 0o700
    assert set(os.listdir(tmp_path)) <= {"valkey.sock", "valkey.log"}


async def test_killed_valkey_is_started_again_and_the_gate_finds_it(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as valkey:
        gate = RedisGate(valkey_url(tmp_path), RedisConfig(retry_interval=0.05))
        await until_answered(gate)
        first_pid = valkey.pid
        with capture_logs() as lines:
            os.kill(first_pid, signal.SIGKILL)
            with pytest.raises(RedisUnavailable):
                await gate.run(gate.redis.ping())
            await until_answered(gate)
        await gate.close()
        assert valkey.pid != first_pid
    events = [line["event"] for line in lines]
    assert events.count("redis is down") == events.count("redis is back") == 1
    assert "process died" in events


async def test_an_answer_from_before_an_outage_does_not_end_it(tmp_path: Path) -> None:
    gate = RedisGate(f"unix://{tmp_path / 'nobody.sock'}", RedisConfig(timeout=10.0, retry_interval=60))
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with capture_logs() as lines:
        earlier = asyncio.create_task(gate.run(answer))
        await asyncio.sleep(0)
        for _ in range(2):
            with pytest.raises(RedisUnavailable):
                await gate.run(gate.redis.ping())
        answer.set_result("late")
        assert await earlier == "late"
        with pytest.raises(RedisUnavailable):
            await gate.run(gate.redis.ping())
    assert [line["event"] for line in lines] == ["redis is down"]
    await gate.close()


async def test_stopped_valkey_holds_no_operation_longer_than_the_timeout(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as valkey:
        gate = RedisGate(valkey_url(tmp_path), RedisConfig(timeout=0.1, retry_interval=0.05))
        await until_answered(gate)
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                with pytest.raises(RedisUnavailable):
                    await gate.run(gate.redis.ping())
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        await until_answered(gate)
        await gate.close()


async def test_a_child_that_cannot_be_started_for_a_while_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evospec.server.supervisor._FIRST_DELAY", 0.05)
    program, away = tmp_path / "program", tmp_path / "away"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    child = SupervisedProcess("program", [str(program)], os.environ, lambda: asyncio.sleep(0))
    await child.start()
    first_pid = child.pid
    program.rename(away)
    keeper = asyncio.create_task(child.keep_alive())
    try:
        with capture_logs() as lines:
            os.kill(first_pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                while sum(line["event"] == "process cannot be started" for line in lines) < 2:
                    assert not keeper.done(), keeper.exception()
                    await asyncio.sleep(0.01)
                away.rename(program)
                while child.pid == first_pid:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert is_running(child.pid)
        delays = [line["restart_in"] for line in lines if "restart_in" in line]
        assert delays[:3] == [0.05, 0.1, 0.2]
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await child.stop(grace=5)


async def test_child_that_dies_before_it_is_ready_is_a_failure(tmp_path: Path) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    child = SupervisedProcess("broken", [sys.executable, "-c", "raise SystemExit(3)"], os.environ, never)
    with pytest.raises(ProcessFailed, match="exit code 3"):
        await child.start()


async def test_valkey_that_cannot_start_says_why(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 120)
    too_long.mkdir()
    with pytest.raises(ProcessFailed, match="Unix socket"):
        await embedded_valkey(too_long).start()


@pytest.mark.skipif(sys.platform != "linux", reason="children are tied to their parent by a Linux system call")
def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = f"""
import asyncio, pathlib
from evospec.engine.log import configure_logging
from evospec.server.processes import embedded_valkey
configure_logging("info", "json")
async def main():
    valkey = embedded_valkey(pathlib.Path({str(tmp_path)!r}))
    await valkey.start()
    print(valkey.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not is_running(child_pid):
            return
        subprocess.run(["sleep", "0.1"], check=True)
    pytest.fail("the child outlived its parent")


def is_running(pid: int) -> bool:
    """Whether ``pid`` is a process and not just the zombie of one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_loop_that_stood_still_is_no_outage(valkey_url: str) -> None:
    gate = RedisGate(valkey_url, RedisConfig(timeout=0.5, retry_interval=60))
    try:
        await gate.run(gate.redis.ping())
        operation = asyncio.create_task(gate.run(gate.redis.blpop(["never"], timeout=10)))
        await asyncio.sleep(0)
        time.sleep(1)  # noqa: ASYNC251
        with pytest.raises(RedisUnavailable):
            await operation
        assert await gate.run(gate.redis.ping())
    finally:
        await gate.close()
