"""The application: routes, and the parts they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import resolve_model
from evospec.engine.models.sampling_defaults import sampling_defaults
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.adapter_control import AdapterControl
from evospec.server.body_room import BodyRoom
from evospec.server.engine_client import EngineClient
from evospec.server.errors import install_error_handlers
from evospec.server.metrics import Metrics
from evospec.server.middleware import RequestMiddleware
from evospec.server.openapi import install_openapi
from evospec.server.rate_limit import LIMIT_HEADERS, RateLimiter
from evospec.server.redis_gate import RedisGate
from evospec.server.responses.store import ResponseStore
from evospec.server.routes import (
    about,
    adapters,
    chat,
    completions,
    embeddings,
    messages,
    page,
    responses,
    sessions,
    tokens,
)
from evospec.server.serving import Serving
from evospec.server.session_store import SessionStore
from evospec.server.settings import ConfigurationError, Settings
from evospec.server.tenants import TenantRegistry
from evospec.server.tools.answer_parser import load_parser
from evospec.server.tools.chat_format import ChatFormat
from evospec.server.work_shares import WorkShares

if TYPE_CHECKING:
    from evospec.server.tracing import Tracing

log = structlog.get_logger(__name__)

_BODIES_PER_TENANT = 4
"""Of the largest size, in the process at a time."""


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application. The engine may start before or after it; /health tells when both are there.

    ``app.state.leaving`` True turns /health to 503; ``draining`` True refuses new requests while running ones finish.
    Raises ``ModelError`` (no such model) and ``ConfigurationError`` (keys file, no Redis) before anything is served.
    """
    if settings.redis.url is None:
        raise ConfigurationError("redis.url is needed where nobody starts an embedded Valkey")
    files = resolve_model(settings.engine.model, progress=False)
    tenants = TenantRegistry.from_settings(settings.auth, settings.limits)
    log_url = settings.engine.alignment.redis_url or settings.redis.url
    gates = RedisGate(settings.redis.url, settings.redis), RedisGate(log_url, settings.redis)
    serving = _serving(settings, files, *gates)
    tracing = _tracing(settings.tracing.endpoint, serving.model)
    app = FastAPI(
        title="EvoSpec",
        version=package_version("evospec"),
        lifespan=partial(_lifespan, gates=gates, tracing=tracing),
        openapi_url=None,  # a route of ours, which wants a key
        redirect_slashes=False,
    )
    app.state.settings, app.state.tenants, app.state.serving = settings, tenants, serving
    app.state.leaving = app.state.draining = False
    for module in (completions, chat, responses, messages, embeddings, tokens, sessions, adapters, about, page):
        app.include_router(module.router)
    app.include_router(about.public_router)
    install_error_handlers(app)
    install_openapi(app, serving.model, tenants.has_keys)
    if origins := settings.http.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Fields", "Retry-After", *LIMIT_HEADERS],
        )
    app.add_middleware(RequestMiddleware, metrics=serving.metrics, tracing=tracing)
    return app


def _serving(settings: Settings, files: ModelFiles, gate: RedisGate, log_gate: RedisGate) -> Serving:
    model, tokenizer, work = settings.engine.model.served_name or files.name, Tokenizer.from_files(files), WorkShares()
    metrics, timeout = Metrics(model), settings.http.engine_timeout
    engine = EngineClient(settings.engine, timeout, metrics.engine, tokenizer.fingerprint())
    metrics.engine.up.set_function(lambda: float(engine.ready))
    return Serving(
        model=model,
        model_root=files.name,
        strict=settings.http.strict,
        created=int(time.time()),
        tokenizer=tokenizer,
        chat_format=ChatFormat.of(tokenizer),
        sampling_defaults=sampling_defaults(files),
        engine=engine,
        rate_limiter=RateLimiter(gate, settings.limits.when_redis_is_down),
        sessions=SessionStore(gate, settings.sessions, metrics, work),
        responses=ResponseStore(gate, settings.responses),
        metrics=metrics,
        adapters=AdapterControl(log_gate, settings.engine.alignment.log.stream),
        work=work,
        bodies=BodyRoom(_BODIES_PER_TENANT * settings.http.max_body_bytes),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI, gates: Sequence[RedisGate], tracing: Tracing | None) -> AsyncIterator[None]:
    serving: Serving = app.state.serving
    load_parser(serving.chat_format)
    connection = asyncio.create_task(serving.engine.run())
    connection.add_done_callback(_log_failure)
    try:
        yield
    finally:
        connection.cancel()
        await asyncio.gather(connection, return_exceptions=True)
        await serving.sessions.close()
        await serving.rate_limiter.close()
        serving.work.close()
        for gate in gates:
            await gate.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def _tracing(endpoint: str | None, model: str) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from evospec.server.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigurationError("tracing.endpoint needs OpenTelemetry: pip install 'evospec[tracing]'") from error
    return Tracing(endpoint, model)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("engine client failed", exc_info=error)
