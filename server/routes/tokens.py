"""POST /tokenize and /detokenize, GET /tokenizer_info, in the shapes vLLM uses."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from fastapi import APIRouter
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from evospec.engine.messages import EngineReady
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.params import check_model, check_token_ids, encode_messages, encode_text
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from evospec.server.schemas.body import Body
from evospec.server.schemas.chat import MAX_MESSAGES, Message, TemplateVariables, few_parts
from evospec.server.schemas.fields import TokenId
from evospec.server.serving import CurrentServing

router = APIRouter(route_class=TenantRoute)


class TokenizeRequest(Body):
    """Exactly one of ``prompt`` and ``messages`` (rendered with the chat template)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, BeforeValidator(few_parts)] = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Begin-of-sequence token and the like; default true for prompt. Not for messages."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "exactly one of prompt and messages is required", {"param": "prompt"})
        if self.messages is not None and self.add_special_tokens is not None:
            raise PydanticCustomError(
                "add_special_tokens",
                "applies to prompt; the chat template decides for messages",
                {"param": "add_special_tokens"},
            )
        return self


class TokenizeResponse(msgspec.Struct, frozen=True):
    """``count`` is the length of ``tokens``."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens by name that begin and end texts, and the chat template (Jinja); None for what the model has not."""

    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class DetokenizeRequest(Body):
    """Token ids to turn into text; special tokens are kept."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**17, fail_fast=True)


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """The text of the tokens."""

    prompt: str


@router.post("/tokenize", responses=success(TokenizeResponse) | errors())
async def tokenize(body: TokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: CurrentServing) -> Response:
    """Token ids of a text or a conversation, as the completion endpoints would see them; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    return JsonResponse(await work.run(_tokens, body, serving.tokenizer, serving.engine_info))


@router.post("/detokenize", responses=success(DetokenizeResponse) | errors())
async def detokenize(body: DetokenizeRequest, _: CurrentTenant, work: CurrentWork, serving: CurrentServing) -> Response:
    """Text of token ids, special tokens included; counts as a request."""
    check_model(body.model or serving.model, serving.model)
    return JsonResponse(await work.run(_text, body.tokens, serving.tokenizer))


@router.get("/tokenizer_info", responses=success(TokenizerInfo) | errors(401, 503))
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
