"""POST /tokenize."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends
from starlette.responses import Response

from engine.messages import EngineReady
from engine.text.tokenizer import Tokenizer
from server.openapi import errors, success
from server.params import check_model, encode_messages, encode_text
from server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from server.schemas.tokens import TokenizeRequest, TokenizeResponse
from server.serving import Serving, get_serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/tokenize",
    responses={**success(TokenizeResponse), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def tokenize(
    body: TokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: Annotated[Serving, Depends(get_serving)]
) -> Response:
    """Token ids of a text or a conversation, as the completion endpoints would see them; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    content = await work.run(_answer, body, serving.tokenizer, serving.engine_info)
    return Response(content, media_type="application/json")


def _answer(body: TokenizeRequest, tokenizer: Tokenizer, info: EngineReady) -> bytes:
    if body.messages is not None:
        tokens = encode_messages(tokenizer, body.messages, info)
    else:
        tokens = encode_text(tokenizer, body.prompt or "", "prompt", info, body.add_special_tokens is not False)
    return msgspec.json.encode(TokenizeResponse(tokens, len(tokens), info.max_model_len))
