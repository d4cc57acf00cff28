"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.openapi import errors, success
from server.params import check_model
from server.routes.tenant_route import CurrentTenant, TenantRoute
from server.schemas.models import ModelCard, ModelList
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.get("/v1/models", responses={**success(ModelList), **errors(401, 503)}, response_model=None)
async def list_models(_: CurrentTenant, serving: Annotated[Serving, Depends(get_serving)]) -> Response:
    """The served model."""
    return _json(ModelList(data=[_card(serving)]))


@router.get("/v1/models/{model:path}", responses={**success(ModelCard), **errors(401, 404, 503)}, response_model=None)
async def get_model(model: str, _: CurrentTenant, serving: Annotated[Serving, Depends(get_serving)]) -> Response:
    """One model."""
    check_model(model, serving.model)
    return _json(_card(serving))


def _card(serving: Serving) -> ModelCard:
    return ModelCard(id=serving.model, created=serving.created, max_model_len=serving.engine_info.max_model_len)


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
