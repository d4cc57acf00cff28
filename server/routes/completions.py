"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from msgspec import UnsetType
from starlette.responses import Response

from server.errors import bad_request
from server.generation import Generation, Piece
from server.logprobs import CompletionLogprobsFormatter, join_logprobs
from server.openapi import errors, success
from server.params import (
    check_max_tokens,
    check_model,
    check_prompts,
    resolve_session_id,
    to_sampling_params,
    tokenize_prompts,
)
from server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from server.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
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
    "/v1/completions",
    responses={**success(Completion, Completion), **errors(400, 401, 404, 413, 429, 503)},
    response_model=None,
)
async def create_completion(
    request: Request,
    body: CompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: Annotated[Serving, Depends(get_serving)],
    x_session_id: SessionHeader = None,
) -> Response:
    """Continue one or several prompts, whole or as a stream of events."""
    check_model(body.model, serving.model)
    session_id = resolve_session_id(body, x_session_id, tenant.name, serving.sessions.config.from_user)
    generation = await _prepare(body, tenant, work, serving, session_id)
    answer = _Answer(body, generation, serving)
    if body.stream:
        return EventStream(answer.events())
    return Response(await run_until_disconnect(request.receive, answer.collect()), media_type="application/json")


async def _prepare(
    body: CompletionRequest, tenant: Tenant, work: RequestWork, serving: Serving, session_id: str | None
) -> Generation:
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream to be true.", "stream_options")
    info = serving.engine_info
    prompts = await tokenize_prompts(work, serving.tokenizer, body.prompt, info)
    check_prompts(prompts, "prompt", info)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    check_max_tokens(max_tokens, "max_tokens", prompts, info)
    sampling = await work.run(
        to_sampling_params,
        body,
        max_tokens=max_tokens,
        vocab_size=info.vocab_size,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return Generation(
        serving, tenant, prompts, sampling, body.n or 1, keep_output=max_tokens > 0, session_id=session_id
    )


class _Answer:
    """Turns pieces into response bodies."""

    def __init__(self, body: CompletionRequest, generation: Generation, serving: Serving) -> None:
        self._body = body
        self._generation = generation
        self._serving = serving
        self._with_logprobs = body.logprobs is not None
        self._formatters: dict[int, CompletionLogprobsFormatter] = {}

    def events(self) -> AsyncGenerator[bytes, None]:
        """Encoded events; one item for all choices of an engine step."""
        return stream_events(self._generation, self._body.stream_options, self._choice, self._completion)

    async def collect(self) -> bytes:
        """The whole answer, encoded."""
        return await whole_answer(self._generation, self._whole_choice, self._whole_completion)

    def _whole_completion(self, choices: list[CompletionChoice]) -> Completion:
        return self._completion(choices, self._generation.usage(), self._generation.metrics())

    def _whole_choice(self, pieces: list[Piece]) -> CompletionChoice:
        return _join([choice for piece in pieces if (choice := self._choice(piece))])

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None, metrics: ResponseMetrics | UnsetType
    ) -> Completion:
        generation = self._generation
        return Completion(
            id=f"cmpl-{generation.id}",
            created=generation.created,
            model=self._serving.model,
            choices=choices,
            usage=usage,
            metrics=metrics,
        )

    def _choice(self, piece: Piece) -> CompletionChoice | None:
        """The piece as a choice; None if there is nothing in it to send."""
        text = piece.text
        if piece.is_first and self._body.echo:
            text = self._prompt_text(piece.index) + text
        logprobs = self._logprobs(piece) if self._with_logprobs else None
        if not text and not piece.finish_reason and not (logprobs and logprobs.tokens):
            return None
        return CompletionChoice(
            index=piece.index,
            text=text,
            logprobs=logprobs,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def _prompt_text(self, index: int) -> str:
        prompt = self._generation.prompt_of(index)
        return self._serving.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _logprobs(self, piece: Piece) -> CompletionLogprobs:
        if piece.index not in self._formatters:
            self._formatters[piece.index] = CompletionLogprobsFormatter(self._serving.tokenizer)
        formatter = self._formatters[piece.index]
        parts = []
        if piece.is_first and self._body.echo:
            prompt = self._generation.prompt_of(piece.index)
            parts.append(formatter.push_prompt(prompt.token_ids, piece.prompt_logprobs, prompt.text))
        parts.append(formatter.push(piece.logprobs))
        return join_logprobs(parts)


def _join(parts: list[CompletionChoice]) -> CompletionChoice:
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=join_logprobs(logprobs) if logprobs else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
    )
