"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from evospec.engine.messages import TokenLogprob
from evospec.server.answer import ChoicesAnswer
from evospec.server.chat_generation import begin_chat
from evospec.server.generation import Generation, Piece
from evospec.server.logprobs import chat_logprobs
from evospec.server.openapi import errors, success
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from evospec.server.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
from evospec.server.serving import CurrentServing, Serving
from evospec.server.tools.answer_parser import AnswerParser
from evospec.server.tools.message_writer import MessageWriter

router = APIRouter(route_class=TenantRoute)


@router.post("/v1/chat/completions", responses=success(ChatCompletion, ChatChunk) | errors())
async def create_chat_completion(
    body: ChatCompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    session_header: SessionHeader,
) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    generation, is_thinking = await begin_chat(body, session_header, tenant, work, serving)
    return await _ChatAnswer(body, generation, serving, is_thinking).respond(work.receive)


class _ChatAnswer(ChoicesAnswer):
    id_prefix, whole, part = "chatcmpl", ChatCompletion, ChatChunk

    def __init__(
        self, body: ChatCompletionRequest, generation: Generation, serving: Serving, is_thinking: bool
    ) -> None:
        super().__init__(body, generation, serving)
        self._with_logprobs = body.logprobs
        self._writers = [
            MessageWriter(AnswerParser(serving.chat_format, bool(body.usable_tools), is_thinking))
            for _ in range(body.n or 1)
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
