"""The listener of the metrics, where it fails: the server goes on, and it is there again."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from evospec.server import launcher


async def test_a_metrics_listener_that_fails_or_ends_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[socket.socket] = []

    class Server:
        """Fails at first, then ends, then runs until the server is stopped."""

        should_exit = False

        def __init__(self, config: object) -> None: ...

        async def serve(self, sockets: list[socket.socket]) -> None:
            served.extend(sockets)
            if len(served) == 1:
                raise RuntimeError("injected")
            self.should_exit = len(served) == 3

    monkeypatch.setattr(launcher, "_ApiServer", Server)
    monkeypatch.setattr(launcher, "_metrics_config", lambda *_: None)
    monkeypatch.setattr(launcher, "_METRICS_DELAY", 0.0)
    running: Any = SimpleNamespace(_metrics=None, _app=None, _http=None)
    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as logs:
        await launcher._Launcher._serve_metrics(running, listener)
        address = listener.getsockname()
        assert [each.getsockname() for each in served] == [address] * 3
    for each in served:
        each.close()
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == [
        "the metrics listener has failed",
        *["the metrics listener has ended, and starts again"] * 2,
    ]
