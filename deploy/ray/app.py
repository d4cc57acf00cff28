"""EvoSpec as an application of Ray Serve: each replica runs an ``evospec serve`` of its own (docs/fleet.md)."""

import asyncio
import os
import shlex
import socket
import sys
from pathlib import Path

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from starlette.background import BackgroundTask

from server.errors import ApiError
from server.supervisor import SupervisedProcess

_PER_CONNECTION = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
"""Headers that are not passed on."""
_RAYS_OWN = {b"date", b"x-request-id"}
"""Headers that Ray adds to each answer: the request's id is the one that the server has been sent."""
_STOP_GRACE = 60.0
"""Seconds that a server gets to finish its requests, more than ``http.drain_timeout``."""

# NOTE: Ray sends the class to other processes, where FastAPI cannot look up annotations that are text. So there is no
# ``from __future__ import annotations`` in this file.
api = FastAPI(openapi_url=None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@serve.deployment
@serve.ingress(api)
class Replica:
    """Starts a server, and passes requests on to it and its answers back, piece by piece.

    Args:
        options: of ``evospec serve``, as in a shell: ``smollm2-135m --redis.url redis://HOST``.
    """

    async def __init__(self, options: str) -> None:
        port = _free_port()
        program = str(Path(sys.executable).with_name("evospec"))
        command = [program, "serve", *shlex.split(options), "--http.port", str(port)]
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=httpx.Timeout(None, connect=5),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._server = SupervisedProcess("server", command, os.environ, self._until_healthy)
        await self._server.start()

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE", "OPTIONS"])
    async def pass_on(self, request: Request) -> Response:
        """What the server answers."""
        headers = [(name, value) for name, value in request.headers.raw if name not in _PER_CONNECTION]
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        body = request.stream() if request.method == "POST" else None
        try:
            answer = await self._http.send(
                self._http.build_request(request.method, url, headers=headers, content=body), stream=True
            )
        except httpx.TransportError:
            return ApiError(503, "The server is not there. Try again.", code="engine_unavailable").response()
        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = [
            (name.lower(), value)
            for name, value in answer.headers.raw
            if name.lower() not in _PER_CONNECTION | _RAYS_OWN
        ]
        return response

    def check_health(self) -> None:
        """Ray replaces a replica whose server has ended. An engine that ends is started again by its server."""
        if not self._server.is_running:
            raise RuntimeError("the server has ended")

    async def __del__(self) -> None:
        await self._server.stop(_STOP_GRACE)

    async def _until_healthy(self) -> None:
        while True:
            try:
                if (await self._http.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


def build(arguments: dict[str, str]) -> serve.Application:
    """The application; ``arguments`` are those of deploy/ray/serve.yaml."""
    return Replica.bind(arguments["options"])
