"""GET /health."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.engine_client import EngineDead
from server.errors import shutting_down
from server.openapi import errors
from server.serving import Serving, get_serving

router = APIRouter()


@router.get(
    "/health",
    responses={200: {"description": "The engine is ready.", "content": None}, **errors(503)},
    response_model=None,
)
async def health(request: Request, serving: Annotated[Serving, Depends(get_serving)]) -> Response:
    """200 while the engine is ready and new requests are taken. Needs no API key."""
    if request.app.state.draining:
        raise shutting_down()
    if not serving.engine.ready:
        raise EngineDead("The engine is not ready.")
    return Response()
