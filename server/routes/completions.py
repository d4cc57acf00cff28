"""POST /v1/completions."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.answer import ChoicesAnswer
from server.echo import with_echo
from server.generation import Generation, Piece
from server.logprobs import CompletionLogprobsFormatter, join_logprobs
from server.openapi import errors, success
from server.params import check_prompts, check_request, fit_max_tokens, to_sampling_params, tokenize_prompts
from server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from server.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from server.serving import CurrentServing, Serving

router = APIRouter(route_class=TenantRoute)


@router.post(
    "/v1/completions",
    responses={**success(Completion, Completion), **errors(400, 401, 404, 413, 429, 503)},
)
async def create_completion(
    request: Request,
    body: CompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    session_header: SessionHeader,
) -> Response:
    """Continue one or several prompts, whole or as a stream of events."""
    session_id = check_request(body, session_header, tenant, serving)
    info = serving.engine_info
    prompts = await tokenize_prompts(work, serving.tokenizer, body.prompt, info, body.suffix)
    check_prompts(prompts, "prompt", info)
    max_tokens = DEFAULT_MAX_TOKENS if body.asked_tokens is None else body.asked_tokens
    max_tokens = fit_max_tokens(max_tokens, body.length_field, prompts, info, serving.strict)
    sampling = await work.run(
        to_sampling_params,
        body,
        max_tokens=max_tokens,
        vocab_size=info.vocab_size,
        defaults=serving.sampling_defaults,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    n = body.n or 1
    if body.echo:
        prompts = await work.run(with_echo, prompts, n, serving.tokenizer)
    generation = Generation(serving, tenant, prompts, sampling, n, max_tokens > 0, session_id)
    return await _CompletionAnswer(body, generation, serving).respond(request.receive)


class _CompletionAnswer(ChoicesAnswer):
    id_prefix, whole, part = "cmpl", Completion, Completion

    def __init__(self, body: CompletionRequest, generation: Generation, serving: Serving) -> None:
        super().__init__(body, generation, serving)
        self._echo = body.echo
        self._with_logprobs = body.logprobs is not None
        self._formatters = defaultdict[int, CompletionLogprobsFormatter](
            lambda: CompletionLogprobsFormatter(self._tokenizer)
        )

    def choice(self, pieces: list[Piece]) -> CompletionChoice:
        parts = [part for piece in pieces if (part := self.part_of_choice(piece))]
        logprobs = [part.logprobs for part in parts if part.logprobs is not None]
        return CompletionChoice(
            index=parts[0].index,
            text="".join(part.text for part in parts),
            logprobs=join_logprobs(logprobs) if logprobs else None,
            finish_reason=parts[-1].finish_reason,
            stop_reason=parts[-1].stop_reason,
        )

    def part_of_choice(self, piece: Piece) -> CompletionChoice | None:
        text = piece.echo + piece.text
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

    def _logprobs(self, piece: Piece) -> CompletionLogprobs:
        formatter = self._formatters[piece.index]
        parts = []
        if piece.is_first and self._echo:
            prompt = self._generation.prompt_of(piece.index)
            parts.append(formatter.push_prompt(prompt.token_ids, piece.prompt_logprobs, prompt.text))
        return join_logprobs([*parts, formatter.push(piece.logprobs)])
