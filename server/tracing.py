"""A span of OpenTelemetry for each request, sent to a collector. Without a collector nothing here is loaded."""

from __future__ import annotations

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

_FIGURES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "acceptance_length": "evospec.acceptance_length",
}
"""Figures of a request's log line, and the attributes that have them; names of OpenTelemetry where it has one."""

_SECONDS = 2.0
"""That spans are tried to be sent, again and again; as long may the end of the server take."""


class Tracing:
    """Sends spans by OTLP over HTTP, from a thread of its own. While the collector is away, at most 2,048 wait.

    ``endpoint`` is the collector's URL, with its path.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "evospec"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=_SECONDS)))
        self._tracer = self._provider.get_tracer("evospec")
        self._model = model

    def record(
        self, scope: Scope, route: str, status: int, seconds: float, tenant: str | None, figures: dict[str, object]
    ) -> None:
        """A request has ended just now. Its span goes on with the trace that its ``traceparent`` header names.

        ``route`` is its path's template, ``tenant`` None where there was none yet, ``figures`` those of its log line.
        """
        attributes: dict[str, str | int | float] = {
            "http.request.method": scope["method"],
            "http.route": route,
            "http.response.status_code": status,
        }
        if tenant is not None:
            attributes["evospec.tenant"] = tenant
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            context=TraceContextTextMapPropagator().extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes=attributes | self._model_attributes(figures),
            start_time=end - int(seconds * 1e9),
        )
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def _model_attributes(self, figures: dict[str, object]) -> dict[str, str | int | float]:
        """Of a request that the model was asked to answer."""
        if "prompt_tokens" not in figures:
            return {}
        values = {_FIGURES[name]: value for name, value in figures.items() if name in _FIGURES}
        if isinstance(ttft := figures["ttft_ms"], float):
            values["gen_ai.latency.time_to_first_token"] = ttft / 1000  # seconds, as in vLLM
        known = {name: value for name, value in values.items() if isinstance(value, int | float)}
        return {"gen_ai.provider.name": "evospec", "gen_ai.request.model": self._model, **known}
