"""What the server says about itself: GET /v1/models, /v1/overview, /health, /metrics, /version and /openapi.json."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from evospec.engine.models.sampling_defaults import SamplingDefaults
from evospec.server.engine_client import EngineDead
from evospec.server.errors import ApiError, shutting_down
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.params import check_model
from evospec.server.routes.tenant_route import CurrentTenant, TenantRoute, current_tenant
from evospec.server.schemas.overview import Overview
from evospec.server.serving import CurrentServing, Serving
from evospec.server.tenants import METRICS_PATH, Tenant, authenticate, is_admin

router = APIRouter(route_class=TenantRoute)
public_router = APIRouter()
"""Of what needs no API key, or finds out for itself who may see it."""
# Documents the header; ``viewer`` is what checks it.
_bearer = HTTPBearer(auto_error=False, description="API key, or admin key")


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """``switched_off``: parts of the engine that have failed several times, such as "draft"; they cost speed only."""

    status: Literal["ok", "degraded"]
    switched_off: list[str]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """The served model. ``max_model_len`` bounds prompt plus output, in tokens.

    ``root``: what it was before ``--served-model-name``, such as its Hugging Face id. ``default_sampling_params``: for
    what a request leaves out. ``type``, ``display_name`` and ``created_at`` are Anthropic's.
    """

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    owned_by: str = "evospec"
    root: str
    max_model_len: int
    default_sampling_params: SamplingDefaults


class Version(msgspec.Struct, frozen=True):
    """/version."""

    version: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models", responses=success(ModelList) | errors(401, 503))
async def list_models(_: CurrentTenant, serving: CurrentServing) -> Response:
    """The served model."""
    return JsonResponse(ModelList(data=[_card(serving)]))


@router.get("/v1/models/{model:path}", responses=success(ModelCard) | errors(401, 404, 503))
async def get_model(model: str, _: CurrentTenant, serving: CurrentServing) -> Response:
    """One model."""
    check_model(model, serving.model)
    return JsonResponse(_card(serving))


def _card(serving: Serving) -> ModelCard:
    return ModelCard(
        id=serving.model,
        display_name=serving.model,
        created=serving.created,
        created_at=datetime.fromtimestamp(serving.created, UTC).isoformat(),
        root=serving.model_root,
        max_model_len=serving.engine_info.max_model_len,
        default_sampling_params=serving.sampling_defaults,
    )


async def viewer(request: Request, _: Annotated[Any, Depends(_bearer)]) -> Tenant | None:
    """FastAPI dependency: the tenant that looks; None: somebody who may see all. Raises 401 as ``ApiError``."""
    if is_admin(request):
        return None
    tenant = await authenticate(request)
    return tenant if request.app.state.tenants.has_keys else None


@public_router.get("/v1/overview", responses=success(Overview) | errors(401, 503))
async def overview(tenant: Annotated[Tenant | None, Depends(viewer)], serving: CurrentServing) -> Response:
    """Acceptance by tenant, domain and place of a draft, since the server started; to an admin also the load."""
    metrics = serving.metrics
    tenants = await asyncio.to_thread(metrics.overview, None if tenant is None else tenant.name)
    load = metrics.engine.load() if tenant is None else None
    body = Overview(model=serving.model, draft=serving.engine_info.draft, tenants=tenants, engine=load)
    return JsonResponse(body)


@public_router.head("/health", include_in_schema=False)
@public_router.get("/health", responses=success(Health) | errors(503))
async def health(request: Request, serving: CurrentServing) -> Response:
    """200 while the engine is ready and the server is not about to end. Needs no API key.

    The body says whether parts that only make the engine faster are switched off. Requests are served all the same.
    """
    if request.app.state.leaving:
        raise shutting_down()
    if not serving.engine.ready:
        raise EngineDead("The engine is not ready.")
    switched_off = serving.metrics.engine.switched_off
    return JsonResponse(Health(status="degraded" if switched_off else "ok", switched_off=switched_off))


@router.get(
    METRICS_PATH,
    responses={200: {"description": "Prometheus text format", "content": {"text/plain": {}}}, **errors(401)},
    dependencies=[Depends(current_tenant)],  # of this route: ``metrics`` itself is also that of a listener without keys
)
async def metrics(serving: CurrentServing) -> Response:
    """Metrics of this server, its engine and its adapters worker, with the names and the traffic of all tenants."""
    if serving.metrics.engine.alignment.is_enabled:
        try:
            worker, adapters = await serving.adapters.status()
        except ApiError:  # Redis is down: nobody knows
            worker, adapters = None, {}
        serving.metrics.engine.alignment.observe_worker(worker, adapters, time.time())
    return Response(await serving.metrics.render_beside(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=success(Version) | errors(401))
async def version(request: Request, _: CurrentTenant) -> Response:
    """The server's version."""
    return JsonResponse(Version(request.app.version))


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: CurrentTenant) -> Response:
    """What this server accepts and answers; it names the model, so it wants a key where there are keys."""
    # In a thread: to make it takes half a second, at the first request.
    return await asyncio.to_thread(lambda: JSONResponse(request.app.openapi()))
