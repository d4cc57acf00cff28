"""All choices of one HTTP request: from token ids to text, usage and metrics."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import msgspec
import structlog
from msgspec import UNSET, UnsetType

from evospec.engine.messages import EngineOutput, EngineRequest, SamplingParams, SessionState, TokenLogprob
from evospec.server.choices import Choice, ChoiceText
from evospec.server.engine_client import Overloaded
from evospec.server.errors import ApiError, bad_request, internal_error
from evospec.server.metrics import FINISH_REASONS
from evospec.server.middleware import log_figures
from evospec.server.params import TokenizedPrompt
from evospec.server.schemas.answers import CompletionTokensDetails, PromptTokensDetails, ResponseMetrics, Usage
from evospec.server.serving import Serving
from evospec.server.tenants import Tenant

LOGPROB_SIZE = 16
"""Bytes of a log-probability on its way through the server, about."""
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What an engine step added to one choice; ``text`` may be empty while a character is incomplete.

    ``prompt_logprobs`` is as in ``EngineOutput``. ``echo`` is what the first piece of a choice has
    in front of its text.
    """

    index: int
    is_first: bool
    text: str
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[bytes]
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    embedding: bytes | None = None
    echo: str = ""

    @property
    def is_ended_by_model(self) -> bool:
        """Whether the choice ends here by the model's own doing: no stop string and no limit cut it off."""
        return self.finish_reason == "stop" and self.stop_reason is None

    @property
    def size(self) -> int:
        """About the bytes of text whose parsing takes as long as it takes to write this out."""
        num_bytes = len(self.echo) + len(self.text) + len(self.embedding or b"") + sum(map(len, self.prompt_logprobs))
        return num_bytes + LOGPROB_SIZE * sum(1 + len(entry.top) for entry in self.logprobs)


class Generation:
    """Runs ``n`` choices for each prompt; choice ``i`` of a prompt samples with seed + i.

    ``keep_output`` False (``max_tokens`` 0, and embeddings) drops the one token that the engine always makes. All
    choices start from the state of the session that ``session_id`` names, and what each ends with is merged into it.
    ``prediction``: what the answers may be.
    """

    def __init__(
        self,
        serving: Serving,
        tenant: Tenant,
        prompts: Sequence[TokenizedPrompt],
        sampling: SamplingParams,
        n: int,
        keep_output: bool = True,
        session_id: str | None = None,
        prediction: Sequence[int] = (),
    ) -> None:
        self._serving = serving
        self._tenant = tenant
        self._prompts = prompts
        self._sampling = sampling
        self._n = n
        self._keep_output = keep_output
        self._session_id = session_id
        self._prediction = list(prediction)
        self._session_snapshots: list[bytes] = []
        self._arrival = time.monotonic()
        self._metrics = serving.metrics.for_tenant(tenant.name)
        self.id = uuid.uuid4().hex
        structlog.contextvars.bind_contextvars(generation=self.id)  # on the log line of the request
        self.created = int(time.time())
        info = serving.engine_info
        self._speculates = info.draft is not None
        most_drafts = info.num_speculative_tokens
        if sampling.num_speculative_tokens is not None:
            most_drafts = min(most_drafts, sampling.num_speculative_tokens)
        self._choices = {
            f"{self.id}-{index}": Choice(index, ChoiceText(serving.tokenizer, sampling.stop), [0] * (most_drafts + 1))
            for index in range(len(prompts) * n)
        }

    async def run(self) -> AsyncGenerator[list[Piece], None]:
        """Pieces of all choices as they come. Closing the iterator aborts what has not finished.

        The request itself was charged before its prompts were tokenised; this charges its tokens.
        Raises ``ApiError``: rate limit, deleted session, full queue, dead engine, or a request the engine refused.
        """
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        most_tokens = prompt_tokens + len(self._choices) * self._sampling.max_tokens
        charge = await self._serving.rate_limiter.admit(self._tenant, most_tokens, requests=0)
        failed = False
        try:
            async with aclosing(self._run_in_session()) as steps:
                async for pieces in steps:
                    yield pieces
        except ApiError as error:
            # Where it is not the tenant's fault, or nothing was made, all that was charged goes back.
            failed = error.status >= 500 or not any(choice.num_tokens for choice in self._choices.values())
            raise
        finally:
            self._tell_log()
            await self._serving.rate_limiter.settle(charge, 0 if failed else self.usage().total_tokens)

    async def _run_in_session(self) -> AsyncGenerator[list[Piece], None]:
        """Load the session if there is one, run the choices, and save it, even if some choice did not finish."""
        session = state = None
        if self._session_id is not None:
            info = self._serving.engine_info
            session = await self._serving.sessions.load(self._tenant.name, self._session_id, info)
        if session is not None:
            state = session.state
            self._metrics = self._serving.metrics.for_tenant(self._tenant.name, session.state.domain)
        keep = None if session is None else partial(self._serving.sessions.save_later, session)
        try:
            async with aclosing(self._serving.engine.generate(self._requests(state), keep)) as steps:
                async for outputs in steps:
                    now = time.monotonic()
                    yield [self._to_piece(output, now) for output in outputs]
            self._observe_end()
        finally:
            if session is not None:
                await self._serving.sessions.save(session, self._session_snapshots)

    async def collect(self, encode: Callable[[Sequence[Piece]], bytes]) -> bytes:
        """What ``encode`` makes of all pieces, once they are there."""
        async with aclosing(self.run()) as steps:
            pieces = [piece async for step in steps for piece in step]
        return await self.in_share(pieces, encode)

    async def in_share(self, pieces: Sequence[Piece], function: Callable[[Sequence[Piece]], T]) -> T:
        """``function(pieces)``, in the tenant's share of work if they are long."""
        size = sum(piece.size for piece in pieces)
        return await self._serving.work.run(self._tenant.name, size, function, pieces)

    def usage(self) -> Usage:
        """Token counts so far."""
        choices = list(self._choices.values())
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        completion_tokens = sum(choice.num_tokens for choice in choices)
        cached_tokens = sum(choice.num_cached_tokens for choice in choices[:: self._n])
        total_tokens = prompt_tokens + completion_tokens
        details = PromptTokensDetails(cached_tokens)
        return Usage(prompt_tokens, completion_tokens, total_tokens, details, self._prediction_details())

    def _prediction_details(self) -> CompletionTokensDetails | UnsetType:
        """What became of the prediction; unset without one."""
        if not self._prediction:
            return UNSET
        accepted = sum(choice.num_predicted_tokens for choice in self._choices.values())
        return CompletionTokensDetails(accepted, max(0, len(self._choices) * len(self._prediction) - accepted))

    def metrics(self) -> ResponseMetrics | UnsetType:
        """How the drafts fared so far; unset without speculation or with several sequences (as in vLLM)."""
        if not self._speculates or len(self._choices) != 1:
            return UNSET
        (choice,) = self._choices.values()
        return ResponseMetrics(speculative_decoding=choice.speculative_decoding())

    def _tell_log(self) -> None:
        """Put what came of the request on its line in the log."""
        usage, choices = self.usage(), self._choices.values()
        drafts = [choice.speculative_decoding() for choice in choices]
        steps = sum(one.num_spec_steps for one in drafts)
        accepted = sum(one.num_accepted_draft_tokens for one in drafts)
        first = min((one.first_output for one in choices if one.last_output is not None), default=None)
        log_figures().update(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            completion_tokens=usage.completion_tokens,
            ttft_ms=None if first is None else round(1000 * (first - self._arrival), 1),
            acceptance_length=round(1 + accepted / steps, 2) if steps else None,
        )

    def prompt_of(self, index: int) -> TokenizedPrompt:
        """The prompt that choice ``index`` continues."""
        return self._prompts[index // self._n]

    def _requests(self, session: SessionState | None) -> list[EngineRequest]:
        return [
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=self.prompt_of(choice.index).token_ids,
                sampling=msgspec.structs.replace(self._sampling, seed=self._seed_of(choice)),
                tenant=self._tenant.name,
                session=session,
                prediction_token_ids=self._prediction,
                learn=self._tenant.learn,
            )
            for request_id, choice in self._choices.items()
        ]

    def _seed_of(self, choice: Choice) -> int:
        seed = self._sampling.seed + choice.index % self._n
        return (seed + 2**63) % 2**64 - 2**63  # wrapped to 64 bits

    def _to_piece(self, output: EngineOutput, now: float) -> Piece:
        if output.finish_reason == "error":
            raise _engine_error(output)
        if not self._keep_output:
            output = msgspec.structs.replace(
                output, token_ids=[], logprobs=None, finish_reason="length", stop_reason=None
            )
        if output.session_snapshot is not None:
            self._session_snapshots.append(output.session_snapshot)
        choice = self._choices[output.request_id]
        is_first = choice.last_output is None
        self._observe(choice, output, now)
        if output.num_draft_tokens:
            choice.count_drafts(output)
            self._metrics.observe_draft(output.num_draft_tokens, output.num_accepted_tokens, output.copied)
        if output.vocabulary is not None:
            self._metrics.observe_vocabulary(output.vocabulary)
        choice.num_cached_tokens = max(choice.num_cached_tokens, output.num_cached_tokens)
        return Piece(
            index=choice.index,
            is_first=is_first,
            text=choice.text.push(output),
            logprobs=output.logprobs or [],
            prompt_logprobs=output.prompt_logprobs or [],
            embedding=output.embedding,
            finish_reason=output.finish_reason,  # type: ignore[arg-type]  # an error was raised above
            stop_reason=output.stop_reason,
            echo=self.prompt_of(choice.index).echo if is_first else "",
        )

    def _observe(self, choice: Choice, output: EngineOutput, now: float) -> None:
        num_tokens, metrics = len(output.token_ids), self._metrics
        if choice.last_output is None:
            choice.first_output = now
            metrics.observe("queue", output.queue_seconds)
            metrics.observe("prefill", max(0.0, now - self._arrival - output.queue_seconds))
            if choice.index % self._n == 0:  # the engine has taken the prompt: once for all of its choices
                metrics.prompt_tokens.inc(len(self.prompt_of(choice.index).token_ids))
            metrics.observe("ttft", now - self._arrival)
        elif num_tokens:
            metrics.observe("inter_token", (now - choice.last_output) / num_tokens)
        choice.last_output = now
        choice.num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)
        if output.finish_reason in FINISH_REASONS:
            metrics.finished[output.finish_reason].inc()
            metrics.observe("decode", now - choice.first_output)
            if choice.num_tokens > 1:
                metrics.observe("token", (now - choice.first_output) / (choice.num_tokens - 1))
            metrics.observe("prompt_tokens", len(self.prompt_of(choice.index).token_ids))
            metrics.observe("generation_tokens", choice.num_tokens)

    def _observe_end(self) -> None:
        self._metrics.observe("e2e", time.monotonic() - self._arrival)
        lengths = [choice.num_tokens for choice in self._choices.values()]
        for first in range(0, len(lengths), self._n):
            self._metrics.observe("most_generation_tokens", max(lengths[first : first + self._n]))


def _engine_error(output: EngineOutput) -> ApiError:
    if output.error_kind == "invalid":
        return bad_request(output.error or "The engine refused the request.")
    return Overloaded() if output.error_kind == "overloaded" else internal_error()
