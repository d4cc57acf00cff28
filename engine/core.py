"""The step loop of the engine: plan → propose → fill → execute → verify → learn → emit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from uuid import uuid4

import structlog
import torch
from msgspec.structs import replace

from evospec.engine.config import EngineConfig
from evospec.engine.gpu_memory import gpu_reserve
from evospec.engine.loader import LoadedModel
from evospec.engine.messages import (
    EngineOutput,
    EngineReady,
    EngineRequest,
    EngineStats,
    ErrorKind,
    StepTimings,
    TokenLogprob,
    TokenSource,
)
from evospec.engine.model_runner import ModelRunner
from evospec.engine.models.config import ModelFiles, ModelSpec
from evospec.engine.optional_parts import OptionalParts
from evospec.engine.prompt_embeddings import take_embedding
from evospec.engine.request import Arrivals, Request, engine_request_id
from evospec.engine.sampling.constrained import ConstrainedRequests
from evospec.engine.sampling.gpu_choices import GpuChoices
from evospec.engine.sampling.grammar_pool import GrammarPool
from evospec.engine.scheduler import QueueFull, RequestTooLong, Scheduler
from evospec.engine.speculation.build import load_draft, make_speculation
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.step import Batch, Decodes, DraftSlot, Proposals, SampledSequence, Step, StepClock, Verification
from evospec.engine.tensor_parallel.processes import load_target
from evospec.engine.text.tokenizer import Tokenizer
from evospec.engine.truncation import Truncation
from evospec.engine.verifier import Verifier

log = structlog.get_logger(__name__)

_IDLE_PATIENCE = 0.5
_COMPILING_PATIENCE, _STALLED_PATIENCE = 0.005, 0.001
_FAILED_STEP = "The model could not compute this step. Other requests go on."
_MOST_FAILED_STEPS = 3
"""In a row, after which the engine ends, to be started anew."""
_NOT_FINITE = "The model has computed numbers that are not finite: its weights may be damaged."

Outputs = defaultdict[bytes, list[EngineOutput]]
"""Outputs by client."""


class EngineCore:
    """A model, its KV cache and its requests. One thread calls ``add``, ``abort`` and ``step``.

    ``draft``: in place of what the configuration asks for. ``target``: loaded already, as the configuration asks for
    it; engines that share it take turns with their steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        spec: ModelSpec,
        draft: Draft | None = None,
        target: LoadedModel | None = None,
    ) -> None:
        loaded = target or load_target(config, files, spec)
        tokenizer = Tokenizer.from_files(files)
        draft = draft or load_draft(config, loaded, files, tokenizer)
        reserved = 0
        if loaded.device.type == "cuda":
            reserved = sum(gpu_reserve(config, spec, loaded.dtype.itemsize, draft is not None))
        self._runner = ModelRunner(loaded, config.cache, draft.costs.bytes_per_block if draft else 0, reserved)
        self._parts = OptionalParts()
        speculation = make_speculation(config, draft, self._runner, loaded.max_model_len, self._parts)
        self._drafter, self._learners = speculation.drafter, speculation.learners
        self._capture, self.step_costs = speculation.capture_layers, speculation.costs
        # What a draft keeps lies in the target's blocks, and it may read all of it, or write to it later.
        window = spec.window if draft is None or not draft.costs.bytes_per_block else None
        sizes = self._runner.num_blocks, loaded.max_model_len
        self._scheduler = Scheduler(config.scheduler, config.cache, *sizes, window, loaded.reads_prompts_apart)
        most = config.scheduler.max_num_seqs + config.scheduler.max_waiting
        self._grammars = GrammarPool(tokenizer, num_slots=most)
        self._constrained = ConstrainedRequests(self._grammars)
        on_gpu: GpuChoices | None = None
        if loaded.device.type == "cuda":
            on_gpu = GpuChoices(self._runner.vocab_size, loaded.device, has_graphs=loaded.cuda_graphs)
        self._verifier = Verifier(tokenizer, loaded.max_model_len, loaded.team, on_gpu)
        self._arrivals, self._vocab_size = Arrivals(spec.vocab_size), spec.vocab_size
        self._unsent: Outputs = defaultdict(list)
        self._num_nonfinite = self._num_failed_steps = self._num_failed_in_a_row = 0
        self._outlives_faults = loaded.device.type == "cpu" and config.runtime.tensor_parallel_size == 1
        """Whether the state is sound after a step that has failed: a GPU, or a process of another rank, may not be."""
        self._is_stalled = False
        """Whether nobody could compute anything in the last step."""
        self.introduction = self._introduce(config, files, loaded, tokenizer, draft)
        """What a server has to know of it."""

    def _introduce(
        self, config: EngineConfig, files: ModelFiles, loaded: LoadedModel, tokenizer: Tokenizer, draft: Draft | None
    ) -> EngineReady:
        return EngineReady(
            epoch=uuid4().hex,
            model=config.model.served_name or files.name,
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.spec.vocab_size,
            num_blocks=self._runner.num_blocks,
            block_size=config.cache.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            dtype=str(loaded.dtype).removeprefix("torch."),
            attention_backend=loaded.backend,
            device="CPU" if loaded.device.type == "cpu" else torch.cuda.get_device_name(),
            kv_bytes=self._runner.kv_bytes,
            draft=draft.description if draft else None,
            num_speculative_tokens=config.speculation.num_speculative_tokens,
            draft_bytes=draft.costs.total(self._runner.num_blocks) if draft else 0,
            vocabulary=tokenizer.fingerprint(),
        )

    def start_grammars(self) -> None:
        """Load what grammars need beside the engine, before the first request wants one."""
        self._grammars.start()

    def add(self, client_id: bytes, message: EngineRequest) -> None:
        """Take a request; a later step's outputs say so if it cannot be served."""
        try:
            request = self._arrivals.take(client_id, message)
        except ValueError as error:
            self._tell_error(client_id, message.request_id, str(error))
            return
        if request.request_id in self._scheduler.requests or request.request_id in self._grammars.waiting:
            log.error("a client has used an id twice", request=request.request_id)  # the first one goes on
            return
        if message.sampling.grammar is not None:
            self._grammars.add(request)
        else:
            self._enqueue(request)

    def abort_client(self, client_id: bytes) -> None:
        """End all requests of a client that has gone away."""
        prefix = engine_request_id(client_id, "")
        requests = [*self._scheduler.requests, *self._grammars.waiting]
        self.abort(client_id, [r.removeprefix(prefix) for r in requests if r.startswith(prefix)])
        self._unsent.pop(client_id, None)

    def abort(self, client_id: bytes, request_ids: Iterable[str]) -> None:
        """End requests; unknown ones have ended already.

        The last output of each says what its session has learned from the output so far.
        """
        for request_id in request_ids:
            engine_id = engine_request_id(client_id, request_id)
            request = self._scheduler.abort(engine_id)
            output = EngineOutput(request_id=request_id, finish_reason="aborted")
            if request is not None and request.output_token_ids:
                output = self._with_learned(request, output)
            self._forget(engine_id, request)
            self._unsent[client_id].append(output)

    def patience(self) -> float:
        """Seconds that the loop may wait for messages before the next step."""
        if self._unsent:
            return 0.0
        if self._scheduler.has_work():
            return _STALLED_PATIENCE if self._is_stalled else 0.0
        return _COMPILING_PATIENCE if self._grammars.waiting else _IDLE_PATIENCE

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        for learner in self._learners:
            stats = self._parts.call(learner.part, stats, learner.add_stats, stats)
        return replace(
            stats,
            nonfinite_sequences=self._num_nonfinite,
            failed_steps=self._num_failed_steps,
            faults=self._parts.faults,
            switched_off=self._parts.switched_off,
        )

    @torch.inference_mode()
    def step(self) -> tuple[Outputs, StepTimings | None]:
        """One step for all requests that fit in it; no timings where there was nothing to compute.

        Plan: the scheduler says who decodes, the drafter how many tokens are worth drafting, and the scheduler gives
        them room. Propose: tokens are drafted. Fill: the rest of the step goes to prompts. Execute: the target computes
        all of it. Verify: it chooses its own tokens; a draft token is accepted if it is the one that the target
        chooses. Learn: learners follow. Emit: the output grows by what was accepted, and by one token that was not
        drafted.
        """
        self._follow_grammars()
        outputs, self._unsent = self._unsent, defaultdict(list)
        if not self._scheduler.has_work():
            return outputs, None
        clock = StepClock()
        decodes = self._scheduler.begin_step()
        clock.lap("schedule")
        lengths = self._lengths(decodes)
        clock.lap("lengths")
        slots = self._scheduler.plan(decodes, lengths)
        clock.lap("schedule")
        proposals = self._proposals(slots)
        clock.lap("propose")
        batch = self._scheduler.fill(slots, proposals)
        self._prepare(batch)
        clock.lap("schedule")
        if self._is_stalled:
            return outputs, None
        try:
            logits, features = self._runner.execute(batch.sequences, self._capture)
            clock.lap("forward")
            self._constrained.wait(batch.sequences)
            verified = self._verifier.verify(batch.sequences, logits)
            clock.lap("sample")
        except Exception:
            self._fail(batch)
            return outputs, None
        self._num_failed_in_a_row = 0
        step = Step(batch, verified, logits, features)
        for learner in self._learners:
            self._parts.call(learner.part, None, learner.learn, step)
            clock.lap(learner.part)
        self._emit(verified, outputs)
        clock.lap("commit")
        self._scheduler.record_seconds(batch, clock.seconds)
        for learner in self._learners:
            self._parts.call(learner.part, None, learner.measured, step, clock)
        return outputs, clock.timings(batch)

    def _lengths(self, decodes: Decodes) -> list[int]:
        """How many tokens to draft for each sequence that decodes; none where that cannot be said."""
        none = [0] * len(decodes.requests)
        lengths = self._parts.call("draft", none, self._drafter.lengths, decodes) if none else none
        return lengths if len(lengths) == len(none) else none

    def _proposals(self, slots: list[DraftSlot]) -> Proposals:
        """Draft tokens that the target can compute, and that grammars allow; none where drafting fails."""
        if not slots:
            return {}
        return self._parts.call("draft", {}, self._checked_proposals, slots)

    def _checked_proposals(self, slots: list[DraftSlot]) -> Proposals:
        proposals = self._drafter.propose(slots)
        room = {slot.request: slot.num_tokens for slot in slots}
        for request, proposal in proposals.items():
            drafts = proposal.token_ids
            if drafts and (len(drafts) > room[request] or not 0 <= min(drafts) <= max(drafts) < self._vocab_size):
                raise ValueError(f"{len(drafts)} draft tokens where {room[request]} fit, or ids that no token has")
            if request.grammar is not None:  # the masks that tell are needed anyway
                proposal.token_ids = request.grammar.allowed(drafts)
        return proposals

    def _prepare(self, batch: Batch) -> None:
        """Ask for the masks of grammars, and tell learners who is not in the step after all."""
        self._is_stalled = not batch.sequences
        self._constrained.ask(batch.sequences)
        for request in batch.preempted:
            for learner in self._learners:
                self._parts.clean_up(learner.part, learner.preempt, request)

    def _fail(self, batch: Batch) -> None:
        """The target's pass over this step has raised: its requests end, and the others go on.

        Raises again where the engine's state may not be sound, and where step after step fails: it is to be restarted.
        """
        self._num_failed_in_a_row += 1
        if not self._outlives_faults or self._num_failed_in_a_row == _MOST_FAILED_STEPS:
            raise
        self._num_failed_steps += 1
        log.exception("a step has failed", sequences=len(batch.sequences), tokens=batch.num_tokens)
        for sequence in batch.sequences:
            self._end(sequence.request, _FAILED_STEP, "internal")

    def _enqueue(self, request: Request) -> None:
        for other in self._scheduler.in_the_way_of(request):
            self._end(other, "Another request has come.", "overloaded")
        try:
            self._scheduler.add(request)
            self._verifier.add(request)
            for learner in self._learners:
                self._parts.call(learner.part, None, learner.begin, request)
        except QueueFull as error:
            self._end(request, str(error), "overloaded")
        except RequestTooLong as error:
            self._end(request, str(error))
        except Exception:
            log.exception("a request cannot be taken", request=request.request_id)
            self._end(request, "The request cannot be taken.", "internal")

    def _end(self, request: Request, reason: str, kind: ErrorKind = "invalid") -> None:
        """End a request with an error that its next output tells."""
        self._scheduler.abort(request.request_id)  # where it may not be yet
        self._forget(request.request_id, request)
        self._tell_error(request.client_id, request.client_request_id, reason, kind)

    def _tell_error(self, client_id: bytes, request_id: str, error: str, kind: ErrorKind = "invalid") -> None:
        self._unsent[client_id].append(
            EngineOutput(request_id=request_id, finish_reason="error", error=error, error_kind=kind)
        )

    def _follow_grammars(self) -> None:
        """Requests begin that waited for their grammar, and end that cannot go on with it."""
        for request, error in self._constrained.follow():
            if error is None:
                self._enqueue(request)
            else:
                self._end(request, error)

    def _emit(self, verified: list[Verification], outputs: Outputs) -> None:
        """Commit the step, and say what each output has got."""
        for one in verified:
            if one.choice is not None and one.truncation is not None:
                outputs[one.request.client_id].append(self._commit(one, one.choice, one.truncation))
            elif one.sequence.num_sampled:
                one.request.is_stalled = True
                self._scheduler.postpone(one.sequence)
            else:
                self._scheduler.commit(one.sequence, [], finished=False)

    def _commit(self, one: Verification, choice: SampledSequence, truncation: Truncation) -> EngineOutput:
        request, kept = one.sequence.request, one.kept
        finish_reason = truncation.finish_reason or (None if choice.is_finite else "error")
        is_first, proposal = not request.output_token_ids, one.sequence.proposal
        self._scheduler.commit(one.sequence, kept, finished=finish_reason is not None)
        logprobs = None if choice.logprobs is None else choice.logprobs[: truncation.num_kept]
        if logprobs is not None:
            logprobs = self._parts.call("vocabulary", logprobs, self._with_sources, one, logprobs)
        # What few outputs have comes later: a call with more than 15 names takes several times as long.
        output = EngineOutput(
            request_id=request.client_request_id,
            token_ids=kept,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=truncation.stop_reason,
            text_length=truncation.text_length,
            num_cached_tokens=request.num_cached_tokens,
            num_draft_tokens=one.sequence.num_draft_tokens,
            num_accepted_tokens=one.num_accepted,
            draft_version=proposal.version,
            copied=one.source == "lookup",
            num_predicted_tokens=one.num_predicted,
        )
        if is_first:
            prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            embedding, seconds = take_embedding(request), request.queue_seconds
            output = replace(output, prompt_logprobs=prompt_logprobs, embedding=embedding, queue_seconds=seconds)
        if finish_reason is not None:
            return self._finish(request, output)
        if request.grammar is not None:
            request.grammar.commit(kept)
        return output

    def _finish(self, request: Request, output: EngineOutput) -> EngineOutput:
        """A request has ended: its last output, with what only that says."""
        if output.finish_reason == "error":
            self._num_nonfinite += 1
            log.error("logits are not finite", request=request.request_id, num_tokens=request.num_tokens)
            output = replace(output, error=_NOT_FINITE)
        output = self._with_learned(request, output)
        self._forget(request.request_id, request)
        return output

    def _forget(self, engine_id: str, request: Request | None) -> None:
        """``request``: None for one that has not begun, or has ended."""
        self._constrained.forget(engine_id)
        if request is not None:
            for learner in self._learners:
                self._parts.clean_up(learner.part, learner.end, request)

    def _with_learned(self, request: Request, output: EngineOutput) -> EngineOutput:
        """A request's last output, with what its session keeps."""
        for learner in self._learners:
            output = self._parts.call(learner.part, output, learner.finish, request, output)
        return output

    def _with_sources(self, one: Verification, entries: list[TokenLogprob]) -> list[TokenLogprob]:
        """The log-probabilities of a step's tokens, with who proposed each that was accepted."""
        if one.source == "lookup":
            predicted = one.sequence.proposal.predicted or [False] * one.num_accepted
            sources: list[TokenSource] = [
                "prediction" if is_so else "copied" for is_so in predicted[: one.num_accepted]
            ]
        else:
            sources = [self._drafter.source(token_id) for token_id in one.kept[: one.num_accepted]]
        named = [replace(entry, source=source) for entry, source in zip(entries, sources, strict=False)]
        return named + entries[len(named) :]
