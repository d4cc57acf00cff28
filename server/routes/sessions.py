"""POST /v1/sessions, GET and DELETE /v1/sessions/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.responses import Response

from evospec.server.errors import bad_request
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.params import find_session
from evospec.server.routes.tenant_route import CurrentTenant, TenantRoute
from evospec.server.schemas.sessions import CreateSessionRequest, DeletedSession, Session
from evospec.server.serving import CurrentServing
from evospec.server.session_ids import new_session_id, user_session_id


class _SessionConvertor(PathConvertor):
    """Any name but an empty one: with slashes, and with line feeds, at which ``path`` would end."""

    regex = "(?s:.+)"


register_url_convertor("session", _SessionConvertor())
router = APIRouter(route_class=TenantRoute)


@router.post("/v1/sessions", responses=success(Session) | errors(400, 401, 413, 429, 503))
async def create_session(
    tenant: CurrentTenant,
    serving: CurrentServing,
    body: CreateSessionRequest | None = None,
) -> Response:
    """Start a session. Counts as a request against the rate limit."""
    body, config = body or CreateSessionRequest(), serving.sessions.config
    if body.ttl_seconds is not None and body.ttl_seconds > config.max_ttl_seconds:
        raise bad_request(f"ttl_seconds may be at most {config.max_ttl_seconds}.", "ttl_seconds")
    if body.user is not None and not config.from_user:
        raise bad_request("This server keeps no sessions by user.", "user", "unsupported_parameter")
    session_id = user_session_id(tenant.name, body.user) if body.user else new_session_id(tenant.name)
    return JsonResponse(await serving.sessions.create(tenant.name, session_id, body.domain, body.ttl_seconds))


@router.get("/v1/sessions/{session_id:session}", responses=success(Session) | errors(400, 401, 404, 503))
async def get_session(session_id: str, tenant: CurrentTenant, serving: CurrentServing) -> Response:
    """What is known of a session. Asking does not extend its life."""
    session_id = find_session(session_id, tenant.name)
    return JsonResponse(await serving.sessions.read(tenant.name, session_id))


@router.delete("/v1/sessions/{session_id:session}", responses=success(DeletedSession) | errors(400, 401, 404, 503))
async def delete_session(session_id: str, tenant: CurrentTenant, serving: CurrentServing) -> Response:
    """Forget a session at once. Requests of it that still run leave nothing behind."""
    session_id = find_session(session_id, tenant.name)
    await serving.sessions.delete(tenant.name, session_id)
    return JsonResponse(DeletedSession(id=session_id))
