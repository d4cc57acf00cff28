"""The route class of everything that needs a tenant."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect

from server.errors import ApiError, bad_request, shutting_down
from server.sse import ClientDisconnected
from server.tenants import Tenant, authenticate

# Documents the header; ``authenticate`` is what checks it.
_bearer = HTTPBearer(auto_error=False, description="API key")


class _JsonRequest(Request):
    """A request whose body was read and parsed before FastAPI asks for it."""

    parsed: Any

    async def json(self) -> Any:
        return self.parsed


class TenantRoute(APIRoute):
    """Finds the tenant and counts its request before it reads the body, and parses the body as strict JSON.

    Strict: no NaN, no lone surrogates, bounded depth. Sizes are bounded by ``app.state.max_body_bytes``.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def authenticate_and_handle(request: Request) -> Response:
            request.state.tenant = await authenticate(request)
            if request.method == "POST":
                if request.app.state.draining:
                    raise shutting_down()
                # First: to read and check what is then refused is work as well.
                await request.app.state.serving.rate_limiter.admit(request.state.tenant, 0)
                request = await _read_json(request)
            return await handler(request)

        return authenticate_and_handle


async def current_tenant(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Tenant:
    """FastAPI dependency: the tenant that ``TenantRoute`` found."""
    tenant: Tenant = request.state.tenant
    return tenant


CurrentTenant = Annotated[Tenant, Depends(current_tenant)]
SessionHeader = Annotated[
    str | None,
    Header(alias="X-Session-Id", description="The same as session_id in the body, for clients that add headers."),
]


async def _read_json(request: Request) -> Request:
    limit: int = request.app.state.max_body_bytes
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ApiError(413, f"The request body is larger than {limit} bytes.")
    except ClientDisconnect as error:
        raise ClientDisconnected from error
    json_request = _JsonRequest(request.scope, request.receive)
    json_request._body = bytes(body)
    if not body:
        return json_request  # FastAPI does not ask for the JSON of an empty body
    try:
        json_request.parsed = msgspec.json.decode(json_request._body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}") from error
    return json_request
