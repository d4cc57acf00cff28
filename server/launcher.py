"""``evospec serve``: starts the engine, Valkey and the API server, watches over them, and ends them in order.

The API server runs in the launcher's own process. The others are children that are started again when they
die; so a crash of the engine costs its running requests and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import resource
import signal
import socket
from collections.abc import Iterator, Sequence

import structlog
import uvicorn
from fastapi import FastAPI

from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.validation import validated_files
from evospec.server.app import create_app
from evospec.server.banner import banner
from evospec.server.errors import install_error_handlers, shutting_down
from evospec.server.http_protocol import LINGER, bounded_http
from evospec.server.instance_directory import instance_directory
from evospec.server.options import HttpConfig
from evospec.server.processes import (
    embedded_valkey,
    engine_process,
    keep_learning_apart,
    learn_where_possible,
    valkey_url,
    wait_until_healthy,
    worker_process,
)
from evospec.server.routes import about
from evospec.server.settings import ConfigurationError, Settings
from evospec.server.supervisor import ProcessFailed, SupervisedProcess
from evospec.server.tenants import METRICS_PATH, TenantRegistry, check_exposure, warn_of_client_key

log = structlog.get_logger(__name__)

_BACKLOG = 2048
_OTHER_FILES = 256
"""Open files that are no connections of clients: sockets of the engine and of Redis, logs, the model's files."""
_MOST_CONNECTIONS = 32_768
"""Where the system sets no limit that counts: each takes about 10 KB of this process's memory."""
_MOST_SCRAPERS = 64
_STOP_GRACE = 5.0
_POLL_INTERVAL = 0.05
_METRICS_DELAY = 1.0


def serve(settings: Settings, *, with_engine: bool) -> int:
    """Run until a signal ends it; returns the exit status: 0 after draining, 1 if something failed or was cut short.

    Raises, before any port opens: ``ConfigurationError`` if keys are needed and missing, or what is learned cannot be
    kept; ``ModelError`` if the model cannot be had or served.
    """
    tenants = TenantRegistry.from_settings(settings.auth, settings.limits)
    check_exposure(settings.http.host, settings.auth, tenants)
    warn_of_client_key(tenants)
    files = validated_files(settings.engine) if with_engine else validated_model(settings.engine.model)
    settings = settings.model_copy(deep=True)
    if with_engine:
        learn_where_possible(settings, files)
    max_connections = _allow_many_connections()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(instance_directory())
        listeners = [stack.enter_context(_listen(settings.http.host, settings.http.port))]
        if settings.http.metrics_address is not None:
            host, _, port = settings.http.metrics_address.rpartition(":")
            listeners.append(stack.enter_context(_listen(host.strip("[]"), int(port))))
        children: list[SupervisedProcess] = []
        learns = with_engine and settings.engine.alignment.enabled
        if learns:
            instance = f"{socket.gethostname()}:{listeners[0].getsockname()[1]}" if settings.redis.url else None
            keep_learning_apart(settings.engine.alignment, instance, stack)
        if settings.redis.url is None:
            settings.redis.url = valkey_url(directory)
            children.append(embedded_valkey(directory))
        if with_engine and "address" not in settings.engine.model_fields_set:  # the operator chose none
            settings.engine.address = f"ipc://{directory / 'engine.sock'}"
        app = create_app(settings)
        if with_engine:
            children.append(engine_process(settings, _local_url(listeners[0]), app))
            if learns:
                children.append(worker_process(settings, app))
        launcher = _Launcher(app, max_connections, listeners, children)
        gc.collect()
        gc.freeze()  # what is there now stays: to walk it in each full collection would stop all requests for 0.1 s
        with asyncio.Runner(loop_factory=launcher.loop_factory) as runner:
            return runner.run(launcher.run())


def _allow_many_connections() -> int:
    """Raise the limit of open files, each connection one, as far as the system lets us.

    Returns how many connections there may be, so that there are files for everything else, and for those that wait to
    be accepted, which may all be accepted before one too many is closed.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(_MOST_CONNECTIONS, most - min(_BACKLOG + _OTHER_FILES, most // 2))


def validated_model(config: ModelConfig) -> ModelFiles:
    """The model's files, fetched if need be, and found fit to serve; raises ``ModelError``."""
    files = resolve_model(config)
    validate_model_files(files)
    return files


class _ApiServer(uvicorn.Server):
    """uvicorn without its signal handlers: the launcher decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def num_running_requests(self) -> int:
        return len(self.server_state.tasks)


class _Launcher:
    """One run of the server, from start to drained. ``listeners``: of the API and, if wanted, of the metrics."""

    def __init__(
        self,
        app: FastAPI,
        max_connections: int,
        listeners: Sequence[socket.socket],
        children: Sequence[SupervisedProcess],
    ) -> None:
        self._app, self._listeners, self._children = app, listeners, children
        self._http = http = app.state.settings.http
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(LINGER) + 1,
            timeout_keep_alive=http.keep_alive_timeout,
            backlog=_BACKLOG,
            http=bounded_http(http, max_connections),
            ws="none",
        )
        self._api = _ApiServer(config)
        self._metrics: _ApiServer | None = None
        self.loop_factory = config.get_loop_factory()
        self._first_signal = asyncio.Event()
        self._second_signal = asyncio.Event()

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        listener, *of_metrics = self._listeners
        log.info("listening", url=_local_url(listener))
        api = asyncio.create_task(self._api.serve(sockets=[listener]))
        servers = [api, *(asyncio.create_task(self._serve_metrics(each)) for each in of_metrics)]
        running = asyncio.create_task(self._run_children())
        first_signal = asyncio.create_task(self._first_signal.wait())
        failure: ProcessFailed | None = None
        try:
            await asyncio.wait({api, running, first_signal}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()  # raises ProcessFailed
            if api.done():
                api.result()
                raise ProcessFailed("the API server did not start")
            await self._drain()
        except ProcessFailed as error:
            failure = error
        finally:
            first_signal.cancel()
            await self._stop(servers, running)
        if failure is not None:
            log.error("giving up", reason=str(failure))
        return 1 if failure is not None or self._second_signal.is_set() else 0

    async def _serve_metrics(self, listener: socket.socket) -> None:
        """Serve metrics until the server ends. A fault there ends no request, and is logged."""
        log.info("metrics", url=_local_url(listener))
        while self._metrics is None or not self._metrics.should_exit:
            self._metrics = _ApiServer(_metrics_config(self._app, self._http))
            try:
                await self._metrics.serve(sockets=[listener.dup()])  # which it closes
            except Exception:
                log.exception("the metrics listener has failed")
            if not self._metrics.should_exit:
                log.error("the metrics listener has ended, and starts again", seconds=_METRICS_DELAY)
                await asyncio.sleep(_METRICS_DELAY)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._first_signal.is_set():
            log.warning("stopping at once", signal=number.name)
            self._second_signal.set()
        else:
            self._first_signal.set()

    async def _run_children(self) -> None:
        """Start the children, say where the server is once it answers, keep the children alive until cancelled."""
        for child in self._children:
            await child.start()
        url, serving = _local_url(self._listeners[0]), self._app.state.serving
        await wait_until_healthy(url)
        text = banner(url, serving.model, serving.engine_info, needs_key=self._app.state.tenants.has_keys)
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or its letters cannot be written there
            print(text, flush=True)
        await asyncio.gather(asyncio.Event().wait(), *(child.keep_alive() for child in self._children))

    async def _drain(self) -> None:
        """Let load balancers see it; then take no new requests, and wait for the running ones within their time."""
        self._app.state.leaving = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._second_signal.wait(), self._http.drain_delay)
        self._app.state.draining = True
        for connection in list(self._api.server_state.connections):
            connection.shutdown()  # after the requests in work on it; what has not arrived whole is refused
        log.info("draining", requests=self._api.num_running_requests, timeout=self._http.drain_timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._http.drain_timeout):
                # uvicorn has no event for "no request is running".
                while self._api.num_running_requests and not self._second_signal.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(_POLL_INTERVAL)

    async def _stop(self, servers: list[asyncio.Task[None]], running: asyncio.Task[None]) -> None:
        """End requests that still run with an error that says why; then children, and the server last."""
        at_once = self._second_signal.is_set()
        unfinished = self._api.num_running_requests
        if unfinished:
            self._app.state.serving.engine.end_requests(shutting_down())
        self._app.state.serving.engine.leaving = True
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.gather(*(child.stop(0 if at_once else _STOP_GRACE) for child in self._children))
        self._api.should_exit = True
        if self._metrics is not None:
            self._metrics.should_exit = True
        self._api.force_exit = at_once
        await asyncio.gather(*servers, return_exceptions=True)
        log.info("stopped", unfinished_requests=unfinished)


def _metrics_config(app: FastAPI, http: HttpConfig) -> uvicorn.Config:
    """A server of what ``app`` answers to /metrics and /health, without keys: for scrapers and probes of operators."""
    alone = FastAPI(openapi_url=None)
    alone.state = app.state
    for path, endpoint in ((METRICS_PATH, about.metrics), ("/health", about.health)):
        alone.add_api_route(path, endpoint, methods=["GET", "HEAD"])
    install_error_handlers(alone)
    bounded = bounded_http(http, _MOST_SCRAPERS)
    return uvicorn.Config(alone, log_config=None, log_level="warning", access_log=False, http=bounded, ws="none")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        # What follows "(while" names the address again.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ConfigurationError(f"cannot listen on {host}:{port}: {reason}") from error


def _local_url(listener: socket.socket) -> str:
    """The URL under which this machine reaches ``listener``."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
