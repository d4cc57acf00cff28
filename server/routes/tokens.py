"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from engine.messages import EngineReady
from engine.text.tokenizer import Tokenizer
from server.json_bodies import JsonResponse
from server.openapi import errors, success
from server.params import check_model, check_token_ids, encode_messages, encode_text
from server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from server.serving import CurrentServing

router = APIRouter(route_class=TenantRoute)


@router.post("/tokenize", responses={**success(TokenizeResponse), **errors(400, 401, 404, 413, 429, 503)})
async def tokenize(body: TokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: CurrentServing) -> Response:
    """Token ids of a text or a conversation, as the completion endpoints would see them; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    return JsonResponse(await work.run(_tokens, body, serving.tokenizer, serving.engine_info))


@router.post("/detokenize", responses={**success(DetokenizeResponse), **errors(400, 401, 404, 413, 429, 503)})
async def detokenize(body: DetokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: CurrentServing) -> Response:
    """Text of token ids, special tokens included; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    return JsonResponse(await work.run(_text, body.tokens, serving.tokenizer))


@router.get("/tokenizer_info", responses={**success(TokenizerInfo), **errors(401, 503)})
async def tokenizer_info(_: CurrentTenant, serving: CurrentServing) -> Response:
    """What a client needs to render conversations itself; the tokens are behind /tokenize and /detokenize."""
    tokenizer, template = serving.tokenizer, serving.tokenizer.chat_template
    return JsonResponse(
        TokenizerInfo(
            bos_token=tokenizer.named_tokens.get("bos_token"),
            eos_token=tokenizer.named_tokens.get("eos_token"),
            vocab_size=tokenizer.vocab_size,
            model_max_length=serving.engine_info.max_model_len,
            chat_template=template.source if template else None,
        )
    )


def _tokens(body: TokenizeRequest, tokenizer: Tokenizer, info: EngineReady) -> bytes:
    if body.messages is not None:
        tokens = encode_messages(tokenizer, body.messages, info, body.chat_template_kwargs).token_ids
    else:
        tokens = encode_text(tokenizer, body.prompt or "", "prompt", info, body.add_special_tokens is not False)
    return msgspec.json.encode(TokenizeResponse(tokens, len(tokens), info.max_model_len))


def _text(token_ids: list[int], tokenizer: Tokenizer) -> bytes:
    check_token_ids(token_ids, "tokens", tokenizer.vocab_size)
    return msgspec.json.encode(DetokenizeResponse(tokenizer.decode(token_ids, skip_special_tokens=False)))
