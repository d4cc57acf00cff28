"""``evospec serve`` under trouble: whole servers, real signals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.models.registry import REGISTRY
from engine.speculation.draft_files import DRAFTS
from tests.running_server import EVOSPEC, SMALL, RunningServer

LaunchServer = Callable[..., RunningServer]
LONG_TOKENS = 128
OTHER_DRAFT = str(DRAFTS / "qwen2.5-coder-0.5b")


def completion_body(max_tokens: int, stream: bool = False) -> dict[str, object]:
    return {
        "model": "smollm2-135m",
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }


class Stream:
    """A streamed completion of ``LONG_TOKENS`` tokens that has begun."""

    def __init__(self, response: httpx.Response) -> None:
        self._events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        self.first = json.loads(next(self._events))

    def rest(self) -> list[dict[str, Any]]:
        """Events to the end; fails if the stream breaks off without [DONE] or an error."""
        events: list[dict[str, Any]] = []
        for data in self._events:
            if data == "[DONE]":
                return events
            events.append(json.loads(data))
            if "error" in events[-1]:
                return events
        pytest.fail(f"the stream broke off after {events[-1:]}")


@contextmanager
def running_stream(base_url: str) -> Iterator[Stream]:
    url = f"{base_url}/v1/completions"
    with httpx.stream("POST", url, json=completion_body(LONG_TOKENS, stream=True), timeout=60) as response:
        assert response.status_code == 200
        yield Stream(response)


def complete(base_url: str, max_tokens: int = 4) -> httpx.Response:
    return httpx.post(f"{base_url}/v1/completions", json=completion_body(max_tokens), timeout=60)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_ends_a_fetch_that_hears_nothing_from_its_index(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        process = subprocess.Popen(
            [EVOSPEC, "serve", "--port", "0", "--engine.model.cache_dir", tmp_path],
            env={**os.environ, "PIP_INDEX_URL": url, "PIP_DEFAULT_TIMEOUT": "600"},
            stdin=subprocess.DEVNULL,
        )
        with process:
            connection, _ = index.accept()
            process.terminate()
            try:
                assert process.wait(timeout=60) == 128 + signal.SIGTERM
            finally:
                process.kill()
        connection.settimeout(60)
        with connection:
            while connection.recv(4096):  # what pip asked for; then its end, as pip is gone too
                pass
    assert not list(tmp_path.rglob("fetch-*"))


def test_sigterm_lets_a_stream_finish_and_takes_nothing_new(launch_server: LaunchServer) -> None:
    server = launch_server("--http.engine_timeout", "600", "--http.drain_timeout", "600")
    engine, valkey = server.pid_of("engine"), server.pid_of("valkey")
    with running_stream(server.base_url) as stream:
        os.kill(engine, signal.SIGSTOP)  # so that the stream cannot end while we look
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_event("draining")
        assert server.health() == 503
        refused = complete(server.base_url)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        os.kill(engine, signal.SIGCONT)
        usage = stream.rest()[-1]["usage"]
    assert usage["completion_tokens"] == LONG_TOKENS
    assert server.process.wait(timeout=30) == 0
    assert not is_running(engine)
    assert not is_running(valkey)


def test_sigterm_waits_neither_for_bodies_that_do_not_come_nor_for_idle_connections(
    launch_server: LaunchServer,
) -> None:
    server = launch_server("--http.drain_timeout", "600")
    host, port = server.base_url.removeprefix("http://").split(":")
    address = host, int(port)
    with (
        socket.create_connection(address, timeout=60) as arriving,
        socket.create_connection(address, timeout=60) as idle,
    ):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        arriving.sendall(head + b"content-length: 100000\r\n\r\n{")
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle.recv(4096).startswith(b"HTTP/1.1 200 ")
        server.process.send_signal(signal.SIGTERM)
        refusal = b"".join(iter(lambda: arriving.recv(4096), b""))
        assert refusal.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"shutting_down"' in refusal.replace(b": ", b":")
        assert idle.recv(4096) == b""
        arriving.sendall(b" ")  # it is still read, for a while
    assert server.process.wait(timeout=60) == 0
    assert not [event for event in server.events() if event["level"] in ("warning", "error", "critical")]


def test_drain_ends_at_its_time_limit_with_a_clear_error(launch_server: LaunchServer) -> None:
    server = launch_server("--http.drain_timeout", "0.1")
    with running_stream(server.base_url) as stream:
        os.kill(server.pid_of("engine"), signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert stream.rest()[-1]["error"]["code"] == "engine_unavailable"
    assert server.process.wait(timeout=30) == 0


def test_second_signal_stops_at_once(launch_server: LaunchServer) -> None:
    server = launch_server("--http.drain_timeout", "600")
    engine = server.pid_of("engine")
    os.kill(engine, signal.SIGSTOP)  # the request can never finish, so only a second signal can end the server
    with running_request(server.base_url):
        server.process.send_signal(signal.SIGINT)
        server.wait_for_event("draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 1
    assert not is_running(engine)


@contextmanager
def running_request(base_url: str) -> Iterator[None]:
    """A request that has reached the server; its outcome does not matter."""
    host, port = base_url.removeprefix("http://").split(":")
    body = json.dumps(completion_body(LONG_TOKENS)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


def test_killed_engine_is_replaced_and_serving_resumes(launch_server: LaunchServer) -> None:
    server = launch_server()
    first = server.pid_of("engine")
    with running_stream(server.base_url) as stream:
        os.kill(first, signal.SIGKILL)
        error = stream.rest()[-1]["error"]
    assert error["code"] == "engine_unavailable"
    assert server.health() == 503
    assert complete(server.base_url).status_code == 503
    server.wait_until_healthy()
    assert server.pid_of("engine") != first
    assert complete(server.base_url).status_code == 200
    assert 'evospec:process_restarts_total{process="engine"} 1.0' in httpx.get(f"{server.base_url}/metrics").text


def test_engine_that_hangs_is_killed_and_replaced(launch_server: LaunchServer) -> None:
    server = launch_server("--http.engine_timeout", "1", "--http.engine_hang_timeout", "2")
    first = server.pid_of("engine")
    with running_stream(server.base_url) as stream:
        os.kill(first, signal.SIGSTOP)
        assert stream.rest()[-1]["error"]["code"] == "engine_unavailable"
    assert server.wait_for_event("process hangs")["pid"] == first
    server.wait_for(lambda: server.pid_of("engine") != first or None, "another engine")
    server.wait_until_healthy()
    assert not is_running(first)
    assert complete(server.base_url).status_code == 200
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert 'evospec:process_hangs_total{process="engine"} 1.0' in metrics
    assert 'evospec:process_restarts_total{process="engine"} 1.0' in metrics


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_requests_go_on_without_valkey(launch_server: LaunchServer, blow: signal.Signals) -> None:
    server = launch_server("--limits.requests_per_minute", "1000", "--redis.retry_interval", "0.2")
    valkey = server.pid_of("valkey")
    with ThreadPoolExecutor(4) as pool:
        before = [pool.submit(complete, server.base_url) for _ in range(8)]
        os.kill(valkey, blow)
        after = [pool.submit(complete, server.base_url) for _ in range(16)]
        statuses = [future.result().status_code for future in before + after]
    if blow == signal.SIGSTOP:
        os.kill(valkey, signal.SIGCONT)
    assert statuses == [200] * 24

    def redis_is_back() -> bool | None:
        complete(server.base_url, max_tokens=1)
        return any(event["event"] == "redis is back" for event in server.events()) or None

    server.wait_for(redis_is_back, "recovery of Redis")
    assert sum(event["event"] == "redis is down" for event in server.events()) == 1


def test_rate_limit_through_http(launch_server: LaunchServer) -> None:
    server = launch_server("--limits.requests_per_minute", "2")
    responses = [complete(server.base_url, max_tokens=1) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert 1 <= int(responses[-1].headers["Retry-After"]) <= 30


def test_engine_and_api_server_can_be_started_alone(
    launch_server: LaunchServer, valkey_url: str, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/private/engine.sock"
    with subprocess.Popen([EVOSPEC, "engine", "--engine.address", address, *SMALL]) as engine:
        try:
            server = launch_server("--engine.address", address, "--redis.url", valkey_url, command="api")
            assert complete(server.base_url).status_code == 200
            assert not [event for event in server.events() if event["event"] == "process started"]
            engine.terminate()
            assert engine.wait(30) == 0  # by a handler of its own: a container's process 1 has no default one
        finally:
            engine.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "API keys"),
        (["--model", "/nowhere/model.gguf"], "no such file"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--keys-file", "/nowhere/keys.toml"], "/nowhere/keys.toml"),
        (["--port", "x"], "http.port"),
        (["--redis.url", "ftp://host"], "redis.url"),
        (["--kv-max-bytes", "1000"], "0 MiB for the KV cache hold 0 tokens"),
        (["--engine.model.max_model_len", "100000"], "the model's limit is 8192"),
        (["--engine.speculation.draft", "/nowhere"], "say what it is by speculation.method"),
        (["--engine.speculation.method", "draft_model"], "needs a model"),
        (["--engine.speculation.method", "eagle3", "--engine.speculation.draft", "/nowhere"], "not an EAGLE-3 draft"),
        (["--engine.speculation.method", "eagle3", "--engine.speculation.draft", OTHER_DRAFT], "shape differs"),
    ],
)
def test_bad_configuration_is_one_line_before_any_port_opens(options: list[str], message: str, free_port: int) -> None:
    arguments = [EVOSPEC, "serve", *(options if "--port" in options else ["--port", str(free_port), *options])]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_truncated_model_is_refused(smollm2_path: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(smollm2_path.read_bytes()[:50_000_000])
    result = subprocess.run(
        [EVOSPEC, "serve", "--model", truncated], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "truncated" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_whose_model_is_damaged_ends(smollm2_path: Path, tmp_path: Path) -> None:
    """Size and time of the file are what they were when its sum was right."""
    directory = tmp_path / "models" / "smollm2-135m"
    shutil.copytree(smollm2_path.parent, directory)
    model, marker = directory / smollm2_path.name, directory / f"{smollm2_path.name}.verified.json"
    before = model.stat()
    with model.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"mtime_ns": before.st_mtime_ns}))
    options = ["--model", "smollm2-135m", "--engine.model.cache_dir", str(tmp_path), *SMALL]
    server = RunningServer(tmp_path / "log.jsonl", [*options, "--engine.speculation.method", "none"])
    assert server.process.wait(timeout=120) == 1
    [found] = [event for event in server.events() if event["event"] == "a file of the model is damaged"]
    assert (found["level"], found["path"], found["expected"]) == (
        "critical", str(model), REGISTRY["smollm2-135m"].sha256,
    )  # fmt: skip
    assert found["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    last = server.events()[-1]
    assert (last["event"], last["level"]) == ("giving up", "error")
    assert "damaged" in str(last["reason"])
    assert not marker.exists()


def test_port_in_use_is_one_line(server: str) -> None:
    port = server.rpartition(":")[2]
    result = subprocess.run([EVOSPEC, "serve", "--port", port], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"evospec: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_keys_guard_the_api_and_logs_hold_neither_keys_nor_prompts(launch_server: LaunchServer, tmp_path: Path) -> None:
    output = subprocess.run([EVOSPEC, "keys", "new", "acme"], capture_output=True, text=True, check=True).stdout
    key = output.splitlines()[1]
    (tmp_path / "keys.toml").write_text(output.partition("lines for the keys file:\n")[2])
    server = launch_server("--keys-file", str(tmp_path / "keys.toml"))
    assert complete(server.base_url).status_code == 401
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "request-7"}
    response = httpx.post(f"{server.base_url}/v1/completions", json=completion_body(4), headers=headers, timeout=60)
    assert (response.status_code, response.headers["X-Request-Id"]) == (200, "request-7")
    line = server.wait_for(
        lambda: next((event for event in server.events() if event.get("request_id") == "request-7"), None), "log line"
    )
    assert (line["tenant"], line["status"]) == ("acme", 200)
    assert key not in str(server.events())
    assert "Once upon" not in str(server.events())
