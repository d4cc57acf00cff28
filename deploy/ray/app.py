"""EvoSpec as an application of Ray Serve (docs/fleet.md).

Each replica runs an ``evospec serve`` of its own. What a replica has not begun to answer when it dies, the ingress
sends to another.
"""

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from evospec.server.errors import ApiError
from evospec.server.processes import wait_until_healthy
from evospec.server.supervisor import SupervisedProcess

_PER_CONNECTION = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
"""Headers that are not passed on."""
_RAYS_OWN = {b"date", b"x-request-id"}
"""Headers that Ray adds to each answer: the request's id is the one that the server has been sent."""
_STOP_GRACE = 60.0
"""Seconds that a server gets to finish its requests, more than ``http.drain_timeout``."""
_NOTICED_SECONDS = 0.1
"""After which the end of a server is known."""
_TRIES = 4
"""Replicas that are asked for one answer, as with Envoy."""
_SENT_ONCE = "/v1/adapters/"
"""Commands, which are not to be carried out twice."""

Headers = list[tuple[bytes, bytes]]

# NOTE: Ray sends the class to other processes, where FastAPI cannot look up annotations that are text. So there is no
# ``from __future__ import annotations`` in this file.
api = FastAPI(openapi_url=None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@serve.deployment
class Replica:
    """Starts a server, and asks it what it is asked itself.

    Args:
        options: of ``evospec serve``, as in a shell: ``smollm2-135m --redis.url redis://HOST``.
    """

    async def __init__(self, options: str) -> None:
        port = _free_port()
        program = str(Path(sys.executable).with_name("evospec"))
        command = [program, "serve", *shlex.split(options), "--http.port", str(port)]
        url = f"http://127.0.0.1:{port}"
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=5),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._server = SupervisedProcess("server", command, os.environ, lambda: wait_until_healthy(url))
        await self._server.start()

    async def answer(self, method: str, path: str, query: bytes, headers: Headers, body: bytes) -> AsyncIterator[Any]:
        """The status and headers of the server's answer, then its body, piece by piece."""
        request = self._http.build_request(method, httpx.URL(path=path, query=query), headers=headers, content=body)
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.TransportError:
            await asyncio.sleep(_NOTICED_SECONDS)
            if not self._server.is_running:
                os._exit(1)  # Ray then knows at once, and asks another replica
            raise
        try:
            yield answer.status_code, answer.headers.raw
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    def check_health(self) -> None:
        """Ray replaces a replica whose server has ended. An engine that ends is started again by its server."""
        if not self._server.is_running:
            raise RuntimeError("the server has ended")

    async def __del__(self) -> None:
        await self._server.stop(_STOP_GRACE)


@serve.deployment
@serve.ingress(api)
class Ingress:
    """Passes requests on to replicas, and their answers back, piece by piece."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    @api.api_route("/{path:path}", methods=["GET", "POST", "DELETE", "OPTIONS"])
    async def pass_on(self, request: Request) -> Response:
        """What a replica answers; another is asked if it dies before that."""
        path, headers = request.url.path, [one for one in request.headers.raw if one[0] not in _PER_CONNECTION]
        asked = request.method, path, request.url.query.encode(), headers, await request.body()
        replicas = self._replicas.options(session_id=request.headers.get("x-session-id", ""))
        for _ in range(1 if path.startswith(_SENT_ONCE) else _TRIES):
            pieces = replicas.answer.remote(*asked)
            try:
                status, headers = await anext(pieces)
            except (RayActorError, httpx.TransportError):
                continue
            response = StreamingResponse(pieces, status)
            named = ((name.lower(), value) for name, value in headers)
            response.raw_headers = [one for one in named if one[0] not in _PER_CONNECTION | _RAYS_OWN]
            return response
        return ApiError(503, "No replica answers. Try again.", code="engine_unavailable").response()


def build(arguments: dict[str, str]) -> serve.Application:
    """The application; ``arguments`` are those of deploy/ray/serve.yaml."""
    return Ingress.bind(Replica.bind(arguments["options"]))
