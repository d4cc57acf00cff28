"""POST /detokenize."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.openapi import errors, success
from server.params import check_model, check_token_ids
from server.routes.tenant_route import CurrentTenant, TenantRoute
from server.schemas.tokens import DetokenizeRequest, DetokenizeResponse
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/detokenize",
    responses={**success(DetokenizeResponse), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def detokenize(
    body: DetokenizeRequest, _: CurrentTenant, serving: Annotated[Serving, Depends(get_serving)]
) -> Response:
    """Text of token ids, special tokens included; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    check_token_ids(body.tokens, "tokens", serving.tokenizer.vocab_size)
    text = serving.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(msgspec.json.encode(DetokenizeResponse(text)), media_type="application/json")
