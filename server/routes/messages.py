"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from evospec.server.anthropic.answer import ErrorMessage, MessageEvent, MessageObject, MessagesAnswer, TokenCount
from evospec.server.anthropic.request import CountTokensRequest, MessagesRequest, to_chat
from evospec.server.chat_generation import begin_chat, encode_chat
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.params import check_model
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from evospec.server.serving import CurrentServing


class MessagesRoute(TenantRoute):
    """A route whose errors are Anthropic's."""

    error_body = staticmethod(ErrorMessage.of)


router = APIRouter(route_class=MessagesRoute)


@router.post("/v1/messages", responses=success(MessageObject, MessageEvent) | errors(body=ErrorMessage))
async def create_message(
    body: MessagesRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    session_header: SessionHeader,
) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    chat = await work.run(to_chat, body)
    generation, is_thinking = await begin_chat(chat, session_header, tenant, work, serving)
    return await MessagesAnswer(chat, generation, serving, is_thinking).respond(work.receive)


@router.post("/v1/messages/count_tokens", responses=success(TokenCount) | errors(body=ErrorMessage))
async def count_tokens(
    body: CountTokensRequest, _: CurrentTenant, work: CurrentWork, serving: CurrentServing
) -> Response:
    """Tokens of a conversation, as the model would see it; counts as a request."""
    check_model(body.model, serving.model)
    chat = await work.run(to_chat, body)
    prompt = await work.run(encode_chat, chat, serving)
    return JsonResponse(TokenCount(len(prompt.token_ids)))
