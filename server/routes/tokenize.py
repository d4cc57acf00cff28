"""POST /tokenize."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from server.openapi import errors, success
from server.params import check_length, check_model, render_messages, tokenize_texts
from server.routes.tenant_route import CurrentTenant, TenantRoute
from server.schemas.tokens import TokenizeRequest, TokenizeResponse
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/tokenize",
    responses={**success(TokenizeResponse), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def tokenize(
    body: TokenizeRequest, _: CurrentTenant, serving: Annotated[Serving, Depends(get_serving)]
) -> Response:
    """Token ids of a text or a conversation, as the completion endpoints would see them; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    if body.messages is not None:
        field, text, with_special = "messages", render_messages(serving.tokenizer, body.messages), False
    else:
        field, text, with_special = "prompt", body.prompt or "", body.add_special_tokens is not False
    info = serving.engine_info
    check_length(text, field, serving.tokenizer, info)
    [tokens] = await tokenize_texts(serving.tokenizer, [text], with_special)
    response = TokenizeResponse(tokens, len(tokens), info.max_model_len)
    return Response(msgspec.json.encode(response), media_type="application/json")
