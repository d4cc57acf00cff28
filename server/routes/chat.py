"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.messages import TokenLogprob
from server.answer import Answer
from server.generation import Generation, Piece
from server.logprobs import chat_logprobs
from server.openapi import errors, success
from server.params import (
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
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
from server.serving import CurrentServing, Serving
from server.tools.message_writer import MessageWriter
from server.tools.structural_tag import chat_grammar, check_tools

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
    session_header: SessionHeader,
) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    session_id = check_request(body, session_header, tenant, serving)
    check_tools(body, serving.chat_format)
    info, n = serving.engine_info, body.n or 1
    prompt = await work.run(
        encode_messages, serving.tokenizer, body.messages, info, body.template_variables(), body.usable_tools
    )
    prompts = [prompt]
    check_prompts(prompts, "messages", info)
    prediction = await work.run(encode_prediction, serving.tokenizer, body.prediction, info)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, field)
    if max_tokens is None:
        max_tokens = default_max_tokens(prompts, n, info, tenant)
    max_tokens = fit_max_tokens(max_tokens, field, prompts, info, serving.strict)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = await work.run(
        to_sampling_params,
        body,
        max_tokens=max_tokens,
        vocab_size=info.vocab_size,
        defaults=serving.sampling_defaults,
        logprobs=logprobs,
    )
    is_thinking = serving.chat_format.is_thinking(prompt.text or "")
    grammar = await work.run(chat_grammar, body, sampling.grammar, serving.chat_format, is_thinking)
    sampling = msgspec.structs.replace(sampling, grammar=grammar)
    generation = Generation(serving, tenant, prompts, sampling, n, session_id=session_id, prediction=prediction)
    return await _ChatAnswer(body, generation, serving, is_thinking).respond(request.receive)


class _ChatAnswer(Answer):
    id_prefix, whole, part = "chatcmpl", ChatCompletion, ChatChunk

    def __init__(
        self, body: ChatCompletionRequest, generation: Generation, serving: Serving, is_thinking: bool
    ) -> None:
        super().__init__(body, generation, serving)
        self._with_logprobs = body.logprobs
        self._writers = [
            MessageWriter(serving.chat_format, bool(body.usable_tools), is_thinking) for _ in range(body.n or 1)
        ]

    def choice(self, pieces: list[Piece]) -> ChatChoice:
        last, writer = pieces[-1], self._writers[pieces[-1].index]
        message, finish_reason = writer.message(pieces), writer.finish_reason(last)
        assert finish_reason is not None, "generation ended before the choice did"
        return ChatChoice(
            index=last.index,
            message=message,
            logprobs=self._logprobs([entry for piece in pieces for entry in piece.logprobs]),
            finish_reason=finish_reason,
            stop_reason=last.stop_reason,
        )

    def part_of_choice(self, piece: Piece) -> ChatChunkChoice | None:
        writer = self._writers[piece.index]
        delta = writer.delta(piece)
        if delta is None and not (piece.finish_reason or (self._with_logprobs and piece.logprobs)):
            return None
        return ChatChunkChoice(
            index=piece.index,
            delta=delta or Delta(content=""),
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=writer.finish_reason(piece),
            stop_reason=piece.stop_reason,
        )

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, entries) if self._with_logprobs else None
