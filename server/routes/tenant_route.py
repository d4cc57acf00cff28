"""The route class of everything that needs a tenant."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import cached_property
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from evospec.server.body_room import BodyRoom
from evospec.server.errors import ApiError, body_error, shutting_down
from evospec.server.json_bodies import decode_json
from evospec.server.schemas.body import Leniency
from evospec.server.serving import Serving
from evospec.server.sse import ClientDisconnected
from evospec.server.tenants import Tenant, authenticate
from evospec.server.work_shares import SMALL, RequestWork

_PLAIN_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""What may stand in a header."""

_NAMES_SESSION = "Names the request's session, if session_id in the body does not."

# Documents the headers; ``authenticate`` is what checks them.
_bearer = HTTPBearer(auto_error=False, description="API key")
_api_key = APIKeyHeader(name="X-Api-Key", auto_error=False, description="API key, as Anthropic's clients send it")


class _JsonRequest(Request):
    """A request whose body was read, parsed and validated before FastAPI asks for it."""

    parsed: Any

    async def json(self) -> Any:
        return self.parsed


class TenantRoute(APIRoute):
    """Finds the tenant and counts its request before it reads the body, which it parses as strict JSON and validates.

    Fields of the body that had no effect are named in the response's header X-Ignored-Fields.

    A body is at most ``http.max_body_bytes`` long. One that is not small waits for its tenant's room
    (``Serving.bodies``), and keeps as much of it as the body is long until the response is complete.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            scope.setdefault("state", {})["until_answered"] = stack
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def authenticate_and_handle(request: Request) -> Response:
            request.state.tenant = await authenticate(request)
            if request.method == "POST":
                if request.app.state.draining:
                    raise shutting_down()
                # First: to read and check what is then refused is work as well.
                await request.app.state.serving.rate_limiter.admit(request.state.tenant, 0)
                request = await self._read_json(request)
            response = await handler(request)
            if ignored := getattr(request.state, "ignored", None):
                response.headers["X-Ignored-Fields"] = ", ".join(ignored)
            return response

        return authenticate_and_handle

    async def _read_json(self, request: Request) -> Request:
        serving: Serving = request.app.state.serving
        tenant: Tenant = request.state.tenant
        limit: int = request.app.state.settings.http.max_body_bytes
        body = await _read_with_room(request, limit, tenant.name, serving.bodies)
        request.state.work = RequestWork(serving.work, tenant.name, len(body), request.receive)
        json_request = _JsonRequest(request.scope, request.receive)
        json_request._body = body[:1]  # FastAPI only looks whether there is one
        if body:
            leniency = Leniency(serving.strict)
            json_request.parsed = await request.state.work.run(self._parse, body, leniency)
            request.state.ignored = [name for name in leniency.ignored if _PLAIN_NAME.fullmatch(name)]
        return json_request

    @cached_property
    def _body_type(self) -> TypeAdapter[Any]:
        assert self.body_field is not None
        model: Any = self.body_field.field_info.annotation
        return TypeAdapter(model)

    def _parse(self, body: bytes, leniency: Leniency) -> Any:
        """The body as the endpoint's model, which passes FastAPI's own validation as it is; 400 if it is none."""
        value = decode_json(body)
        if value is None or self.body_field is None:
            return value
        try:
            return self._body_type.validate_python(value, context=leniency)
        except ValidationError as error:
            raise body_error(error, value) from None


async def current_tenant(
    request: Request, _: Annotated[Any, Depends(_bearer)], __: Annotated[Any, Depends(_api_key)]
) -> Tenant:
    """FastAPI dependency: the tenant that ``TenantRoute`` found."""
    tenant: Tenant = request.state.tenant
    return tenant


async def current_work(request: Request) -> RequestWork:
    """FastAPI dependency: where the work of a request with a body is done."""
    work: RequestWork = request.state.work
    return work


CurrentTenant = Annotated[Tenant, Depends(current_tenant)]
CurrentWork = Annotated[RequestWork, Depends(current_work)]


async def _session_header(
    x_session_id: Annotated[str | None, Header(alias="X-Session-Id", description=_NAMES_SESSION)] = None,
    session_id: Annotated[str | None, Header(alias="Session-Id", description=_NAMES_SESSION)] = None,
    x_session_affinity: Annotated[str | None, Header(alias="X-Session-Affinity", description=_NAMES_SESSION)] = None,
) -> str | None:
    """FastAPI dependency: the first of the headers X-Session-Id, Session-Id and X-Session-Affinity that is there."""
    name = x_session_id or session_id or x_session_affinity
    return None if name is None else name.encode("latin-1").decode("utf-8", "replace")  # as bodies and paths have it


SessionHeader = Annotated[str | None, Depends(_session_header)]


async def _read_with_room(request: Request, limit: int, tenant: str, bodies: BodyRoom) -> bytes:
    """The body, whose room, unless it is small, is kept until the response is complete; 413 for a larger one."""
    # A client that does not say how long its body is may send as much as is allowed.
    size = int(request.headers.get("content-length", limit if "transfer-encoding" in request.headers else 0))
    if size > limit:
        raise _too_large(limit)
    if size <= SMALL:
        return await _read_body(request, limit)
    shrink = await request.state.until_answered.enter_async_context(bodies.hold(tenant, size))
    body = await _read_body(request, limit)
    shrink(len(body))
    return body


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _too_large(limit)
    except ClientDisconnect as error:
        raise ClientDisconnected from error
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.")
