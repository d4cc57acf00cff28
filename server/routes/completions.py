"""POST /v1/completions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.responses import Response

from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.answer import ChoicesAnswer
from evospec.server.errors import bad_request
from evospec.server.generation import LOGPROB_SIZE, Generation, Piece
from evospec.server.logprobs import CompletionLogprobsFormatter, join_logprobs
from evospec.server.openapi import errors, success
from evospec.server.params import TokenizedPrompt, check_request, fit_max_tokens, to_sampling_params, tokenize_prompts
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from evospec.server.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from evospec.server.serving import CurrentServing, Serving

router = APIRouter(route_class=TenantRoute)
_MAX_ECHO = 16 * 1024**2
"""Bytes in front of all completions of a request: of a prompt they are written once for each choice. Log-probabilities
count."""


@router.post("/v1/completions", responses=success(Completion, Completion) | errors())
async def create_completion(
    body: CompletionRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    session_header: SessionHeader,
) -> Response:
    """Continue one or several prompts, whole or as a stream of events."""
    session_id = check_request(body, session_header, tenant, serving)
    prompts = await work.run(tokenize_prompts, serving.tokenizer, body.prompt, serving.engine_info, body.suffix)
    max_tokens = fit_max_tokens(body, DEFAULT_MAX_TOKENS, prompts, serving)
    prompt_logprobs = body.logprobs if body.echo else None
    sampling = await work.run(to_sampling_params, body, max_tokens, serving, body.logprobs, prompt_logprobs)
    n = body.n or 1
    if body.echo:
        num_logprobs = 0 if body.logprobs is None else 1 + body.logprobs
        prompts = await work.run(_with_echo, prompts, n, num_logprobs, serving.tokenizer)
    generation = Generation(serving, tenant, prompts, sampling, n, max_tokens > 0, session_id)
    return await _CompletionAnswer(body, generation, serving).respond(work.receive)


def _with_echo(
    prompts: Sequence[TokenizedPrompt], n: int, num_logprobs: int, tokenizer: Tokenizer
) -> list[TokenizedPrompt]:
    """The prompts, each with its text to be put in front of its ``n`` choices; 400 for too much of it.

    ``num_logprobs``: of each token.
    """
    echoing, num_bytes = [], 0
    for prompt in prompts:
        echo = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
        num_bytes += n * (len(echo.encode()) + LOGPROB_SIZE * num_logprobs * len(prompt.token_ids))
        if num_bytes > _MAX_ECHO:
            raise bad_request(
                f"The prompts in front of all completions are more than {_MAX_ECHO} bytes, where each log-probability "
                f"counts {LOGPROB_SIZE}: ask for fewer prompts at once, a smaller n, fewer logprobs, or no echo.",
                "echo",
            )
        echoing.append(replace(prompt, echo=echo))
    return echoing


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
