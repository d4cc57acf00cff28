"""GET /v1/adapters, POST /v1/adapters/{key}/rollback, freeze, unfreeze and reset: for operators."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Path, Request
from fastapi.security import HTTPBearer
from starlette.responses import Response

from evospec.engine.online.adapter_control import AdapterCommand, AdapterStatus, WorkerStatus
from evospec.server.errors import ApiError
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.serving import CurrentServing
from evospec.server.tenants import is_admin, sent_key


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter key, and what the worker reports of it."""

    key: str
    status: AdapterStatus


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """All keys that the worker has in hand, and the worker itself; None if none ever ran."""

    object: Literal["list"] = "list"
    worker: WorkerStatus | None
    data: list[Adapter]


class AcceptedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """The worker will carry it out within seconds, or when it is back."""

    object: Literal["adapter.command"] = "adapter.command"
    key: str
    action: str


# Documents the header; ``require_admin`` is what checks it.
_bearer = HTTPBearer(auto_error=False, description="Admin key")


async def require_admin(request: Request, _: Annotated[Any, Depends(_bearer)]) -> None:
    """FastAPI dependency: 401 without a key, 403 for a tenant's, or if there is no admin key to have."""
    if request.app.state.settings.auth.admin_key is None:
        raise ApiError(403, "No admin key is configured: see auth.admin_key.")
    if is_admin(request):
        return
    if request.app.state.tenants.is_key(sent_key(request)):
        raise ApiError(403, "This needs the admin key (auth.admin_key), not a tenant's.")
    raise ApiError(401, "This needs the admin key: send 'Authorization: Bearer KEY'.", code="invalid_api_key")


router = APIRouter(dependencies=[Depends(require_admin)])


@router.get("/v1/adapters", responses=success(AdapterList) | errors(401, 503))
async def list_adapters(serving: CurrentServing) -> Response:
    """What the adapters worker reported last."""
    worker, adapters = await serving.adapters.status()
    data = [Adapter(key=key, status=status) for key, status in sorted(adapters.items())]
    return JsonResponse(AdapterList(worker=worker, data=data))


@router.post(
    "/v1/adapters/{key:path}/{action}",
    status_code=202,
    responses={202: success(AcceptedCommand)[200], **errors(400, 401, 404, 503)},
)
async def command_adapter(
    key: Annotated[str, Path(min_length=1, max_length=128)],
    action: Literal["rollback", "freeze", "unfreeze", "reset"],
    serving: CurrentServing,
) -> Response:
    """Rollback: to the good version before, or the base draft. Freeze: learn no more. Reset: forget all of the key."""
    await serving.adapters.send(AdapterCommand(action, key))
    return JsonResponse(AcceptedCommand(key=key, action=action), status_code=202)
