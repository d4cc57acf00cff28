"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from engine.messages import TokenLogprob
from server.errors import bad_request
from server.generation import Generation, Piece
from server.logprobs import chat_logprobs
from server.openapi import errors, success
from server.params import (
    TokenizedPrompt,
    check_max_tokens,
    check_model,
    check_prompts,
    default_max_tokens,
    encode_messages,
    resolve_session_id,
    to_sampling_params,
)
from server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from server.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
from server.schemas.metrics import ResponseMetrics
from server.schemas.usage import Usage
from server.serving import Serving, get_serving
from server.sse import EventStream, run_until_disconnect
from server.stream_events import stream_events, whole_answer
from server.tenants import Tenant
from server.work_shares import RequestWork

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/v1/chat/completions",
    responses={**success(ChatCompletion, ChatChunk), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def create_chat_completion(
    request: Request,
    body: ChatCompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: Annotated[Serving, Depends(get_serving)],
    x_session_id: SessionHeader = None,
) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    check_model(body.model, serving.model)
    session_id = resolve_session_id(body, x_session_id, tenant.name, serving.sessions.config.from_user)
    generation = await _prepare(body, tenant, work, serving, session_id)
    answer = _Answer(body, generation, serving)
    if body.stream:
        return EventStream(answer.events())
    return Response(await run_until_disconnect(request.receive, answer.collect()), media_type="application/json")


async def _prepare(
    body: ChatCompletionRequest, tenant: Tenant, work: RequestWork, serving: Serving, session_id: str | None
) -> Generation:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true.", "stream_options")
    info = serving.engine_info
    prompts = [TokenizedPrompt(await work.run(encode_messages, serving.tokenizer, body.messages, info))]
    check_prompts(prompts, "messages", info)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, field)
    if max_tokens is None:
        max_tokens = default_max_tokens(prompts, body.n or 1, info, tenant)
    check_max_tokens(max_tokens, field, prompts, info)
    sampling = await work.run(
        to_sampling_params,
        body,
        max_tokens=max_tokens,
        vocab_size=info.vocab_size,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Generation(serving, tenant, prompts, sampling, body.n or 1, session_id=session_id)


class _Answer:
    """Turns pieces into response bodies."""

    def __init__(self, body: ChatCompletionRequest, generation: Generation, serving: Serving) -> None:
        self._body = body
        self._generation = generation
        self._serving = serving

    def events(self) -> AsyncGenerator[bytes, None]:
        """Encoded events; one item for all choices of an engine step."""
        return stream_events(self._generation, self._body.stream_options, self._chunk_choice, self._chunk)

    async def collect(self) -> bytes:
        """The whole answer, encoded."""
        return await whole_answer(self._generation, self._choice, self._completion)

    def _completion(self, choices: list[ChatChoice]) -> ChatCompletion:
        generation = self._generation
        return ChatCompletion(
            id=f"chatcmpl-{generation.id}",
            created=generation.created,
            model=self._serving.model,
            choices=choices,
            usage=generation.usage(),
            metrics=generation.metrics(),
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None, metrics: ResponseMetrics | UnsetType
    ) -> ChatChunk:
        generation = self._generation
        return ChatChunk(
            id=f"chatcmpl-{generation.id}",
            created=generation.created,
            model=self._serving.model,
            choices=choices,
            usage=usage,
            metrics=metrics,
        )

    def _chunk_choice(self, piece: Piece) -> ChatChunkChoice | None:
        """The piece as a choice; None if there is nothing in it to send."""
        if not (piece.text or piece.finish_reason or piece.is_first or (self._body.logprobs and piece.logprobs)):
            return None
        return ChatChunkChoice(
            index=piece.index,
            delta=Delta(role="assistant" if piece.is_first else UNSET, content=piece.text),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def _choice(self, pieces: list[Piece]) -> ChatChoice:
        last = pieces[-1]
        assert last.finish_reason is not None, "generation ended before the choice did"
        return ChatChoice(
            index=last.index,
            message=AssistantMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs([entry for piece in pieces for entry in piece.logprobs]),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._serving.tokenizer, entries) if self._body.logprobs else None
