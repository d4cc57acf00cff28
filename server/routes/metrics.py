"""GET /metrics."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.errors import ApiError
from server.openapi import errors
from server.routes.tenant_route import CurrentTenant, TenantRoute
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.get(
    "/metrics",
    responses={200: {"description": "Prometheus text format", "content": {"text/plain": {}}}, **errors(401, 403)},
    response_model=None,
)
async def metrics(
    tenant: CurrentTenant, request: Request, serving: Annotated[Serving, Depends(get_serving)]
) -> Response:
    """Metrics of this server, its engine and its adapters worker, with the names and the traffic of all tenants."""
    settings = request.app.state.settings
    if request.app.state.tenants.has_keys and tenant.name != settings.auth.metrics_tenant:
        raise ApiError(403, f"Metrics are for the tenant {settings.auth.metrics_tenant!r} (auth.metrics_tenant).")
    if settings.engine.alignment.enabled:
        try:
            worker, adapters = await serving.adapters.status()
        except ApiError:  # Redis is down: nobody knows
            worker, adapters = None, {}
        serving.metrics.alignment.observe_worker(worker, adapters, time.time())
    return Response(b"".join(serving.metrics.render()), media_type=CONTENT_TYPE_LATEST)
