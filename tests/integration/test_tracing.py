"""Spans of requests, at a real receiver of OTLP over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.server.app import create_app
from evospec.server.settings import ConfigurationError, load_settings
from evospec.server.tenants import hash_key

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver(ThreadingHTTPServer):
    """Keeps the bodies that it gets, and answers that all is well."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        """All spans so far."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        resources = [resource for request in requests for resource in request.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(self.rfile.read(length))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = Thread(target=receiver.serve_forever)
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


def two_steps(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[1], num_cached_tokens=2)
    yield EngineOutput(
        request_id=request.request_id,
        token_ids=[2, 3],
        num_draft_tokens=4,
        num_accepted_tokens=1,
        finish_reason="length",
    )


async def test_a_request_is_a_span_of_its_clients_trace(serve: Any, receiver: Receiver) -> None:
    keys = ("--auth.keys", f"acme={hash_key('secret')}")
    async with serve(two_steps, *keys, "--otlp-traces-endpoint", receiver.url, draft="tiny") as api:
        api.client.headers.update({"Authorization": "Bearer secret", "traceparent": f"00-{TRACE}-{PARENT}-01"})
        answer = await api.post("/v1/chat/completions")
        await api.client.get("/health")
    [span] = receiver.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "POST /v1/chat/completions"
    attributes = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 0 < attributes.pop("gen_ai.latency.time_to_first_token") < seconds < 60
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "evospec.tenant": "acme",
        "gen_ai.provider.name": "evospec",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 3,
        "evospec.acceptance_length": 2.0,
    }


async def test_refused_requests_and_foreign_headers_are_spans_too(serve: Any, receiver: Receiver) -> None:
    async with serve(two_steps, "--otlp-traces-endpoint", receiver.url) as api:
        api.client.headers["traceparent"] = "nonsense"
        await api.post("/v1/chat/completions", temperature=-1)
        await api.client.get("/secret-path")
    refused, unknown = sorted(receiver.spans(), key=lambda span: span.start_time_unix_nano)
    assert refused.parent_span_id == b""
    assert (refused.name, unknown.name) == ("POST /v1/chat/completions", "GET other")


async def test_a_collector_that_is_away_costs_no_answer(serve: Any, receiver: Receiver) -> None:
    receiver.server_close()
    async with serve(two_steps, "--otlp-traces-endpoint", receiver.url) as api:
        assert (await api.post("/v1/chat/completions")).status_code == 200


def test_without_its_packages_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evospec.server.tracing", None)
    options = ["--model", "smollm2-135m", "--redis.url", "redis://127.0.0.1:1"]
    with pytest.raises(ConfigurationError, match=r"pip install 'evospec\[tracing\]'"):
        create_app(load_settings([*options, "--otlp-traces-endpoint", "http://127.0.0.1:1/v1/traces"]))
