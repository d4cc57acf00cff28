"""The application: routes, and the parts they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from engine.models.registry import resolve_model
from engine.models.sampling_defaults import sampling_defaults
from engine.text.tokenizer import Tokenizer
from server.adapter_control import AdapterControl
from server.body_room import BodyRoom
from server.engine_client import EngineClient
from server.errors import install_error_handlers
from server.metrics import Metrics
from server.middleware import RequestMiddleware
from server.openapi import install_openapi
from server.rate_limit import RateLimiter
from server.redis_gate import RedisGate
from server.responses.store import ResponseStore
from server.routes import (
    about,
    adapters,
    chat,
    completions,
    docs,
    embeddings,
    messages,
    overview,
    page,
    responses,
    sessions,
    tokens,
)
from server.serving import Serving
from server.session_store import SessionStore
from server.settings import ConfigurationError, Settings
from server.tenants import TenantRegistry
from server.tools.answer_parser import load_parser
from server.tools.chat_format import ChatFormat
from server.work_shares import WorkShares

if TYPE_CHECKING:
    from server.tracing import Tracing

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
    tokenizer = Tokenizer.from_files(files)
    model = settings.engine.model.served_name or files.name
    app = FastAPI(
        title="EvoSpec",
        version=package_version("evospec"),
        lifespan=_lifespan,
        openapi_url=None,  # a route of ours, which wants a key
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.leaving = app.state.draining = False
    app.state.model, app.state.model_root = model, files.name
    app.state.tokenizer = tokenizer
    app.state.sampling_defaults = sampling_defaults(files)
    app.state.metrics = Metrics(model)
    app.state.tracing = _tracing(settings.tracing.endpoint, model)
    app.state.tenants = TenantRegistry.from_settings(settings.auth, settings.limits)
    for module in (
        *(completions, chat, responses, messages, embeddings, tokens),
        *(sessions, adapters, about, overview, page, docs),
    ):
        app.include_router(module.router)
    app.include_router(about.public_router)
    install_error_handlers(app)
    install_openapi(app, model, app.state.tenants.has_keys)
    if origins := settings.http.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Ignored-Fields", "Retry-After"],
        )
    app.add_middleware(RequestMiddleware, metrics=app.state.metrics, tracing=app.state.tracing)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state, settings = app.state, app.state.settings
    gate = RedisGate(settings.redis.url, settings.redis)
    log_gate = RedisGate(settings.engine.alignment.redis_url or settings.redis.url, settings.redis)
    vocabulary = state.tokenizer.fingerprint()
    engine = EngineClient(settings.engine, settings.http.engine_timeout, state.metrics.engine, vocabulary)
    state.metrics.engine.up.set_function(lambda: float(engine.ready))
    work = WorkShares()
    state.serving = Serving(
        model=state.model,
        model_root=state.model_root,
        strict=settings.http.strict,
        created=int(time.time()),
        tokenizer=state.tokenizer,
        chat_format=ChatFormat.of(state.tokenizer),
        sampling_defaults=state.sampling_defaults,
        engine=engine,
        rate_limiter=RateLimiter(gate, settings.limits.when_redis_is_down),
        sessions=SessionStore(gate, settings.sessions, state.metrics, work),
        responses=ResponseStore(gate, settings.responses),
        metrics=state.metrics,
        adapters=AdapterControl(log_gate, settings.engine.alignment.log.stream),
        work=work,
        bodies=BodyRoom(_BODIES_PER_TENANT * settings.http.max_body_bytes),
    )
    load_parser(state.serving.chat_format)
    connection = asyncio.create_task(engine.run())
    connection.add_done_callback(_log_failure)
    try:
        yield
    finally:
        connection.cancel()
        await asyncio.gather(connection, return_exceptions=True)
        await state.serving.sessions.close()
        await state.serving.rate_limiter.close()
        work.close()
        await gate.close()
        await log_gate.close()
        if state.tracing is not None:
            await asyncio.to_thread(state.tracing.close)


def _tracing(endpoint: str | None, model: str) -> Tracing | None:
    if endpoint is None:
        return None
    try:
        from server.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ConfigurationError("tracing.endpoint needs OpenTelemetry: pip install 'evospec[tracing]'") from error
    return Tracing(endpoint, model)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("engine client failed", exc_info=error)
