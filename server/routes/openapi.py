"""GET /openapi.json."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.routes.tenant_route import CurrentTenant, TenantRoute

router = APIRouter(route_class=TenantRoute)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: CurrentTenant) -> Response:
    """What this server accepts and answers; it names the model, so it wants a key where there are keys."""
    return JSONResponse(request.app.openapi())
