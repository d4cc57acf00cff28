"""``evospec serve`` under trouble: whole servers, real signals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from evospec.engine.models.registry import REGISTRY
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.server import cli, launcher
from evospec.server.settings import ConfigurationError
from evospec.server.tenants import hash_key
from tests.running_command import run_evospec
from tests.running_server import AT_ONCE, EVOSPEC, SMALL, RunningServer
from tests.tiny_models import make_directory

LaunchServer = Callable[..., RunningServer]
MODEL = "smollm2-135m"
METRICS_KEY, LIMITED_KEY = "evs-metrics", "evs-limited"
LONG_TOKENS = 400
OTHER_DRAFT = str(DRAFTS / "qwen2.5-coder-0.5b")


def completion_body(max_tokens: int, stream: bool = False, model: str = MODEL) -> dict[str, object]:
    return {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "num_speculative_tokens": 0,  # a stream has so many steps
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
def running_stream(base_url: str, model: str = MODEL, key: str = "none") -> Iterator[Stream]:
    url, headers = f"{base_url}/v1/completions", {"Authorization": f"Bearer {key}"}
    body = completion_body(LONG_TOKENS, stream=True, model=model)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200
        yield Stream(response)


def complete(base_url: str, max_tokens: int = 4, model: str = MODEL, key: str = "none") -> httpx.Response:
    body, headers = completion_body(max_tokens, model=model), {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{base_url}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that starts sooner, where its answers do not matter; of the name that it is served by.

    Of so many layers that ``LONG_TOKENS`` take it a while.
    """
    directory = tmp_path_factory.mktemp("models") / "tiny"
    files = make_directory(directory, hidden_size=128, head_dim=32, num_hidden_layers=24, max_position_embeddings=1024)
    return files.path


@dataclass(frozen=True)
class EngineAlone:
    """An engine for API servers that are started alone, and the options that they find it by."""

    process: subprocess.Popen[bytes]
    options: list[str]


@pytest.fixture(scope="module")
def engine_alone(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[EngineAlone]:
    address = f"ipc://{tmp_path_factory.mktemp('alone')}/private/engine.sock"
    options = ["--engine.address", address, "--model", str(tiny)]
    with subprocess.Popen([EVOSPEC, "engine", *options, *SMALL]) as process:
        yield EngineAlone(process, options)
        process.kill()


@dataclass(frozen=True)
class Lasting:
    """A server that is no worse after a test than before it, and the key of a tenant, acme."""

    server: RunningServer
    key: str

    def complete(self, max_tokens: int = 4) -> httpx.Response:
        return complete(self.server.base_url, max_tokens, key=self.key)

    def restarts(self) -> float:
        """How often its engine was started again."""
        headers = {"Authorization": f"Bearer {METRICS_KEY}"}
        lines = httpx.get(f"{self.server.base_url}/metrics", headers=headers).raise_for_status().text.splitlines()
        name = 'evospec:process_restarts_total{process="engine"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Lasting]:
    directory = tmp_path_factory.mktemp("lasting")
    output = subprocess.run([EVOSPEC, "keys", "new", "acme"], capture_output=True, text=True, check=True).stdout
    monitoring = f'[tenants.prometheus]\nkeys = ["{hash_key(METRICS_KEY)}"]\n'
    limited = f'[tenants.limited]\nkeys = ["{hash_key(LIMITED_KEY)}"]\nrequests_per_minute = 2\n'
    (directory / "keys.toml").write_text(output.partition("lines for the keys file:\n")[2] + monitoring + limited)
    options = ["--keys-file", str(directory / "keys.toml"), *AT_ONCE, "--http.metrics_address", "127.0.0.1:0"]
    limits = ["--limits.requests_per_minute", "1000", "--redis.retry_interval", "0.2", "--redis.timeout", "2"]
    server = RunningServer(directory / "log.jsonl", [*SMALL, *options, *limits])
    try:
        server.wait_until_healthy()
        yield Lasting(server, output.splitlines()[1])
    finally:
        server.stop()


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
            try:
                connection, _ = index.accept()
                process.terminate()
                assert process.wait(timeout=60) == 128 + signal.SIGTERM
            finally:
                process.kill()
        connection.settimeout(60)
        with connection:
            while connection.recv(4096):  # what pip asked for; then its end, as pip is gone too
                pass
    assert not list(tmp_path.rglob("fetch-*"))


def test_sigterm_lets_a_stream_finish_and_takes_nothing_new(launch_server: LaunchServer, tiny: Path) -> None:
    server = launch_server("--http.engine_timeout", "600", "--http.drain_timeout", "600", "--model", str(tiny))
    engine, valkey = server.pid_of("engine"), server.pid_of("valkey")
    with running_stream(server.base_url, tiny.name) as stream:
        os.kill(engine, signal.SIGSTOP)  # so that the stream cannot end while we look
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_event("draining")
        assert server.health() == 503
        refused = complete(server.base_url, model=tiny.name)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        os.kill(engine, signal.SIGCONT)
        usage = stream.rest()[-1]["usage"]
    assert usage["completion_tokens"] == LONG_TOKENS
    assert server.process.wait(timeout=30) == 0
    assert not is_running(engine)
    assert not is_running(valkey)
    assert "engine lost" not in [event["event"] for event in server.events()]


def test_sigterm_waits_neither_for_bodies_that_do_not_come_nor_for_idle_connections(
    launch_server: LaunchServer, engine_alone: EngineAlone
) -> None:
    server = launch_server("--http.drain_timeout", "600", *engine_alone.options, command="api")
    host, port = server.base_url.removeprefix("http://").split(":")
    address = host, int(port)
    with (
        socket.create_connection(address, timeout=60) as arriving,
        socket.create_connection(address, timeout=60) as idle,
    ):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        arriving.sendall(head + b"content-length: 100000\r\n\r\n{")
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):  # headers and body may come apart
            received = idle.recv(4096)
            assert received
            answer += received
        assert answer.startswith(b"HTTP/1.1 200 ")
        server.process.send_signal(signal.SIGTERM)
        refusal = b"".join(iter(lambda: arriving.recv(4096), b""))
        assert refusal.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"shutting_down"' in refusal.replace(b": ", b":")
        assert idle.recv(4096) == b""
        arriving.sendall(b" ")  # it is still read, for a while
    assert server.process.wait(timeout=60) == 0
    assert server.wait_for_event("stopped")["unfinished_requests"] == 0
    assert not [event for event in server.events() if event["level"] in ("warning", "error", "critical")]


@pytest.mark.parametrize("command", ["serve", "api"])
def test_drain_ends_at_its_time_limit_with_a_clear_error(
    launch_server: LaunchServer, engine_alone: EngineAlone, tiny: Path, command: str
) -> None:
    options = engine_alone.options if command == "api" else ["--model", str(tiny)]
    server = launch_server("--http.drain_timeout", "0.1", *options, command=command)
    engine = engine_alone.process.pid if command == "api" else server.pid_of("engine")
    with running_stream(server.base_url, tiny.name) as stream:
        os.kill(engine, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert stream.rest()[-1]["error"]["code"] == "shutting_down"
    if command == "api":
        os.kill(engine, signal.SIGCONT)
    assert server.process.wait(timeout=30) == 0
    assert "engine lost" not in [event["event"] for event in server.events()]


def test_requests_are_taken_until_load_balancers_know(
    launch_server: LaunchServer, engine_alone: EngineAlone, tiny: Path
) -> None:
    server = launch_server("--http.drain_delay", "600", *engine_alone.options, command="api")
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.health() == 503 or None, "health 503")
    assert complete(server.base_url, model=tiny.name).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=30) == 1


def test_second_signal_stops_at_once(launch_server: LaunchServer, tiny: Path) -> None:
    server = launch_server("--http.drain_timeout", "600", "--model", str(tiny))
    engine = server.pid_of("engine")
    os.kill(engine, signal.SIGSTOP)  # the request can never finish, so only a second signal can end the server
    with running_request(server.base_url, tiny.name):
        server.process.send_signal(signal.SIGINT)
        server.wait_for_event("draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 1
    assert not is_running(engine)


@contextmanager
def running_request(base_url: str, model: str) -> Iterator[None]:
    """A request that has reached the server; its outcome does not matter."""
    host, port = base_url.removeprefix("http://").split(":")
    body = json.dumps(completion_body(LONG_TOKENS, model=model)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


def test_killed_engine_is_replaced_and_serving_resumes(lasting: Lasting) -> None:
    server, before = lasting.server, lasting.restarts()
    first = server.pid_of("engine")
    with running_stream(server.base_url, key=lasting.key) as stream:
        os.kill(first, signal.SIGKILL)
        error = stream.rest()[-1]["error"]
    assert error["code"] == "engine_unavailable"
    assert server.health() == 503
    assert lasting.complete().status_code == 503
    server.wait_until_healthy()
    assert server.pid_of("engine") != first
    assert lasting.complete().status_code == 200
    assert lasting.restarts() == before + 1


def test_engine_that_hangs_is_killed_and_replaced(launch_server: LaunchServer, tiny: Path) -> None:
    server = launch_server("--http.engine_timeout", "2", "--http.engine_hang_timeout", "4", "--model", str(tiny))
    first = server.pid_of("engine")
    with running_stream(server.base_url, tiny.name) as stream:
        os.kill(first, signal.SIGSTOP)
        assert stream.rest()[-1]["error"]["code"] == "engine_unavailable"
    assert server.wait_for_event("process hangs")["pid"] == first
    server.wait_for(lambda: server.pid_of("engine") != first or None, "another engine")
    server.wait_until_healthy()
    assert not is_running(first)
    # At times late again.
    server.wait_for(lambda: complete(server.base_url, model=tiny.name).status_code == 200 or None, "an answer")
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert 'evospec:process_hangs_total{process="engine"} 1.0' in metrics
    assert 'evospec:process_restarts_total{process="engine"} 1.0' in metrics


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_requests_go_on_without_valkey(lasting: Lasting, blow: signal.Signals) -> None:
    server = lasting.server
    valkey, num_events = server.pid_of("valkey"), len(server.events())
    with ThreadPoolExecutor(4) as pool:
        before = [pool.submit(lasting.complete) for _ in range(8)]
        os.kill(valkey, blow)
        after = [pool.submit(lasting.complete) for _ in range(16)]
        statuses = [future.result().status_code for future in before + after]
    if blow == signal.SIGSTOP:
        os.kill(valkey, signal.SIGCONT)
    assert statuses == [200] * 24

    def count(name: str) -> int:
        return sum(event["event"] == name for event in server.events()[num_events:])

    def redis_is_back() -> bool | None:
        lasting.complete(max_tokens=1)
        return count("redis is back") > 0 or None

    server.wait_for(redis_is_back, "recovery of Redis")
    assert count("redis is down") == 1


def test_rate_limit_through_http(lasting: Lasting) -> None:
    responses = [complete(lasting.server.base_url, max_tokens=1, key=LIMITED_KEY) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert 1 <= int(responses[-1].headers["Retry-After"]) <= 30


def test_engine_and_api_server_can_be_started_alone(
    launch_server: LaunchServer, valkey_url: str, engine_alone: EngineAlone, tiny: Path
) -> None:
    """The last of the tests with this engine."""
    server = launch_server(*engine_alone.options, "--redis.url", valkey_url, command="api")
    assert complete(server.base_url, model=tiny.name).status_code == 200
    assert not [event for event in server.events() if event["event"] == "process started"]
    engine_alone.process.terminate()
    assert engine_alone.process.wait(30) == 0  # by a handler of its own: a container's process 1 has no default one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "API keys"),
        (["--model", "/nowhere/model.gguf"], "no such file"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--keys-file", "/nowhere/keys.toml"], "/nowhere/keys.toml"),
        (["--port", "x"], "http.port"),
        (["--engine.address", "tcp://nonsense"], "engine.address"),
        (["--redis.url", "ftp://host"], "redis.url"),
        (["--kv-max-bytes", "1000"], "0 MiB for the KV cache hold 0 tokens"),
        (["--engine.model.max_model_len", "100000"], "the model's limit is 8192"),
        (["--engine.speculation.draft", "/nowhere"], "speculation.draft is no EAGLE-3 draft, and no model"),
        (["--engine.speculation.method", "draft_model"], "needs a model"),
        (["--engine.speculation.method", "eagle3", "--engine.speculation.draft", "/nowhere"], "not an EAGLE-3 draft"),
        (["--engine.speculation.method", "eagle3", "--engine.speculation.draft", OTHER_DRAFT], "shape differs"),
    ],
)
def test_bad_configuration_is_one_line_before_any_port_opens(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which is spared its signals and its log."""
    monkeypatch.setattr(launcher, "_listen", lambda *_: pytest.fail("a port opens"))
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)
    assert run_evospec(monkeypatch, "serve", *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)


def test_truncated_model_is_refused(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(smollm2_path.read_bytes()[:50_000_000])
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)
    assert run_evospec(monkeypatch, "serve", "--model", str(truncated)) == 2
    printed = capsys.readouterr().err
    assert "truncated" in printed
    assert "Traceback" not in printed


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
    [end] = [event for event in server.events() if event["event"] == "giving up"]
    assert end["level"] == "error"
    assert "damaged" in str(end["reason"])
    assert not marker.exists()


def test_a_number_that_is_no_port_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1:99999: .*0-65535"):
        launcher._listen("127.0.0.1", 99999)


def test_a_banner_that_nobody_reads_ends_no_server(tmp_path: Path, tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [EVOSPEC, "serve", "--model", str(tiny), *SMALL, *AT_ONCE, "--port", "0"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=writing, stderr=log) as process:
        os.close(writing)
        deadline = time.monotonic() + 120
        while b"engine ready" not in (tmp_path / "log").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)  # in which it prints the banner
        process.terminate()
        assert process.wait(60) == 0


def test_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [EVOSPEC, "serve", "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"evospec: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_keys_guard_the_api_and_logs_hold_neither_keys_nor_prompts(lasting: Lasting) -> None:
    server = lasting.server
    assert complete(server.base_url).status_code == 401
    headers = {"Authorization": f"Bearer {lasting.key}", "X-Request-Id": "request-7"}
    response = httpx.post(f"{server.base_url}/v1/completions", json=completion_body(4), headers=headers, timeout=60)
    assert (response.status_code, response.headers["X-Request-Id"]) == (200, "request-7")
    expected = {"request_id": "request-7", "tenant": "acme", "status": 200}
    server.wait_for(lambda: any(expected.items() <= event.items() for event in server.events()) or None, "log line")
    assert lasting.key not in str(server.events())
    assert "Once upon" not in str(server.events())


def test_metrics_have_an_address_of_their_own(lasting: Lasting) -> None:
    server = lasting.server
    alone = server.wait_for_event("metrics")["url"]
    assert httpx.get(f"{server.base_url}/metrics").status_code == 401
    assert httpx.get(f"{alone}/health").status_code == 200
    assert 'vllm:num_requests_running{engine="0"' in httpx.get(f"{alone}/metrics").text
    assert httpx.get(f"{alone}/v1/models").status_code == 404
