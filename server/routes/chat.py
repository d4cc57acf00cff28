"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from engine.messages import TokenLogprob
from server.answer import Answer
from server.generation import Generation, Piece
from server.logprobs import chat_logprobs
from server.openapi import errors, success
from server.params import (
    TokenizedPrompt,
    check_prompts,
    check_request,
    default_max_tokens,
    encode_messages,
    encode_prediction,
    fit_max_tokens,
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
from server.serving import CurrentServing, Serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/v1/chat/completions",
    responses={**success(ChatCompletion, ChatChunk), **errors(400, 401, 404, 413, 429, 503)},
)
async def create_chat_completion(
    request: Request,
    body: ChatCompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    x_session_id: SessionHeader = None,
) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    session_id = check_request(body, x_session_id, tenant, serving)
    info, n = serving.engine_info, body.n or 1
    variables = body.template_variables()
    prompts = [TokenizedPrompt(await work.run(encode_messages, serving.tokenizer, body.messages, info, variables))]
    check_prompts(prompts, "messages", info)
    prediction = await work.run(encode_prediction, serving.tokenizer, body.prediction, info)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, field)
    if max_tokens is None:
        max_tokens = default_max_tokens(prompts, n, info, tenant)
    max_tokens = fit_max_tokens(max_tokens, field, prompts, info, serving.strict)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = await work.run(
        to_sampling_params, body, max_tokens=max_tokens, vocab_size=info.vocab_size, logprobs=logprobs
    )
    generation = Generation(serving, tenant, prompts, sampling, n, session_id=session_id, prediction=prediction)
    return await _ChatAnswer(body, generation, serving).respond(request.receive)


class _ChatAnswer(Answer):
    id_prefix, whole, part = "chatcmpl", ChatCompletion, ChatChunk

    def __init__(self, body: ChatCompletionRequest, generation: Generation, serving: Serving) -> None:
        super().__init__(body, generation, serving)
        self._with_logprobs = body.logprobs

    def choice(self, pieces: list[Piece]) -> ChatChoice:
        last = pieces[-1]
        assert last.finish_reason is not None, "generation ended before the choice did"
        return ChatChoice(
            index=last.index,
            message=AssistantMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs([entry for piece in pieces for entry in piece.logprobs]),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )

    def part_of_choice(self, piece: Piece) -> ChatChunkChoice | None:
        if not (piece.text or piece.finish_reason or piece.is_first or (self._with_logprobs and piece.logprobs)):
            return None
        return ChatChunkChoice(
            index=piece.index,
            delta=Delta(role="assistant" if piece.is_first else UNSET, content=piece.text),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, entries) if self._with_logprobs else None
