"""POST /detokenize."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from engine.text.tokenizer import Tokenizer
from server.openapi import errors, success
from server.params import check_model, check_token_ids
from server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from server.schemas.tokens import DetokenizeRequest, DetokenizeResponse
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/detokenize",
    responses={**success(DetokenizeResponse), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def detokenize(
    body: DetokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: Annotated[Serving, Depends(get_serving)]
) -> Response:
    """Text of token ids, special tokens included; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    content = await work.run(_answer, body.tokens, serving.tokenizer)
    return Response(content, media_type="application/json")


def _answer(token_ids: list[int], tokenizer: Tokenizer) -> bytes:
    check_token_ids(token_ids, "tokens", tokenizer.vocab_size)
    return msgspec.json.encode(DetokenizeResponse(tokenizer.decode(token_ids, skip_special_tokens=False)))
