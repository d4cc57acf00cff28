"""GET /metrics."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.errors import ApiError
from server.openapi import errors
from server.routes.tenant_route import TenantRoute, current_tenant
from server.serving import Serving, get_serving
from server.tenants import METRICS_PATH

router = APIRouter(route_class=TenantRoute)


@router.get(
    METRICS_PATH,
    responses={200: {"description": "Prometheus text format", "content": {"text/plain": {}}}, **errors(401)},
    dependencies=[Depends(current_tenant)],
    response_model=None,
)
async def metrics(request: Request, serving: Annotated[Serving, Depends(get_serving)]) -> Response:
    """Metrics of this server, its engine and its adapters worker, with the names and the traffic of all tenants."""
    settings = request.app.state.settings
    if settings.engine.alignment.enabled:
        try:
            worker, adapters = await serving.adapters.status()
        except ApiError:  # Redis is down: nobody knows
            worker, adapters = None, {}
        serving.metrics.engine.alignment.observe_worker(worker, adapters, time.time())
    return Response(serving.metrics.render(), media_type=CONTENT_TYPE_LATEST)
