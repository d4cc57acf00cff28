"""GET /v1/overview: how drafts fare, for the page and whoever wants numbers without Prometheus."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from starlette.responses import Response

from server.json_bodies import JsonResponse
from server.openapi import errors, success
from server.schemas.overview import Overview
from server.serving import CurrentServing
from server.tenants import Tenant, authenticate, is_admin

router = APIRouter()
# Documents the header; ``viewer`` is what checks it.
_bearer = HTTPBearer(auto_error=False, description="API key, or admin key")


async def viewer(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Tenant | None:
    """FastAPI dependency: the tenant that looks; None: somebody who may see all. Raises 401 as ``ApiError``."""
    if is_admin(request):
        return None
    tenant = await authenticate(request)
    return tenant if request.app.state.tenants.has_keys else None


@router.get("/v1/overview", responses={**success(Overview), **errors(401, 503)})
async def overview(tenant: Annotated[Tenant | None, Depends(viewer)], serving: CurrentServing) -> Response:
    """Acceptance by tenant, domain and place of a draft, since the server started; to an admin also the load."""
    metrics = serving.metrics
    tenants = await asyncio.to_thread(metrics.overview, None if tenant is None else tenant.name)
    load = metrics.engine.load() if tenant is None else None
    body = Overview(model=serving.model, draft=serving.engine_info.draft, tenants=tenants, engine=load)
    return JsonResponse(body)
