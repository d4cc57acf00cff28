"""/metrics and /health on an address of their own, without keys: for scrapers and probes in a network of operators."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.engine_client import EngineDead
from server.errors import install_error_handlers
from server.http_protocol import bounded_http
from server.options import HttpConfig
from server.routes import about
from server.serving import Serving
from server.tenants import METRICS_PATH

_MOST_CONNECTIONS = 64


def metrics_app(app: FastAPI) -> Starlette:
    """What ``app`` answers to both, whoever asks."""
    alone = Starlette(routes=[Route(METRICS_PATH, _metrics), Route("/health", _health)])
    alone.state = app.state
    install_error_handlers(alone)
    return alone


def metrics_config(app: FastAPI, bounds: HttpConfig) -> uvicorn.Config:
    """A server of that alone, for as many connections as scrapers and probes need."""
    http = bounded_http(bounds, _MOST_CONNECTIONS)
    return uvicorn.Config(
        metrics_app(app), log_config=None, log_level="warning", access_log=False, http=http, ws="none"
    )


async def _metrics(request: Request) -> Response:
    return await about.metrics(request, _serving(request))


async def _health(request: Request) -> Response:
    return await about.health(request, _serving(request))


def _serving(request: Request) -> Serving:
    serving: Serving | None = getattr(request.app.state, "serving", None)
    if serving is None:
        raise EngineDead("The server is starting.")
    return serving
