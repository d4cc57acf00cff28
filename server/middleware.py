"""What happens around every request: its id, one log line, metrics, and a 500 for what nobody expected."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import quote

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evospec.server.errors import internal_error
from evospec.server.metrics import Metrics
from evospec.server.sse import ClientDisconnected, StreamFailed

if TYPE_CHECKING:
    from evospec.server.tracing import Tracing

log = structlog.get_logger("server.access")

CLIENT_CLOSED_REQUEST = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/metrics")
_MOST_SHOWN = 200
"""Characters of a path."""
_SESSION = "/v1/sessions/"
"""What follows it in a path may be a person's name."""


_figures: ContextVar[dict[str, object]] = ContextVar("figures")
_headers: ContextVar[dict[str, str]] = ContextVar("headers")


def log_figures() -> dict[str, object]:
    """What else the log line of the current request will say: to be written to, in whatever task of the request."""
    return _figures.get({})


def more_headers() -> dict[str, str]:
    """What else the headers of the current request's response will be: to be written to, in any task of the request."""
    return _headers.get({})


class RequestMiddleware:
    """Outermost middleware, in plain ASGI so that a streamed token costs one more function call only.

    A stream that ends with an error is recorded with the error's status, not with the 200 that it began with.
    ``X-Request-Id`` is taken from the client if it is 1 to 128 of ``A-Za-z0-9._:-``, else made, and sent back.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.monotonic()
        figures: dict[str, object] = {}
        _figures.set(figures)
        further: dict[str, str] = {}
        _headers.set(further)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = headers["Request-Id"] = request_id  # OpenAI's name for it, and Anthropic's
                headers.update(further)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            status = CLIENT_CLOSED_REQUEST
        except StreamFailed as failure:
            status = failure.status  # the client has seen 200 and then the error
        except Exception:
            log.exception("unexpected error")
            if not status:
                await internal_error().response(scope)(scope, receive, send_with_id)
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.monotonic() - started, figures)

    def _record(self, scope: Scope, status: int, seconds: float, figures: dict[str, object]) -> None:
        tenant = structlog.contextvars.get_contextvars().get("tenant")
        labels = (self._metrics.model, self._metrics.tenants.label(tenant) if tenant else "")
        endpoint = getattr(scope.get("route"), "path_format", "other")  # its template: there are few
        self._metrics.requests.labels(*labels, endpoint, str(status)).inc()
        if status == CLIENT_CLOSED_REQUEST:
            self._metrics.disconnects.labels(*labels).inc()
        write = log.debug if scope["path"] in _QUIET else log.info
        duration = round(seconds * 1000, 1)
        if self._tracing is not None and scope["path"] not in _QUIET:
            self._tracing.record(scope, endpoint, status, seconds, tenant, figures)
        path = _loggable(scope["path"])
        write("request", method=scope["method"], path=path, status=status, duration_ms=duration, **figures)


def _loggable(path: str) -> str:
    """A path without the name of a session, and without what a terminal would do something at."""
    return f"{_SESSION}{{session_id}}" if path.startswith(_SESSION) else quote(path[:_MOST_SHOWN], safe="/:@")
