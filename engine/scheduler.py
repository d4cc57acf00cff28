"""Continuous batching: which sequences compute how many tokens in the next step. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Sequence

from evospec.engine.admission import PROMPT_TOKEN_SERVICE, Admission
from evospec.engine.config import CacheConfig, SchedulerConfig
from evospec.engine.kv_cache_manager import KVCacheManager
from evospec.engine.messages import EngineStats
from evospec.engine.prompt_chunks import StepTime, prompt_rows_left, share_out
from evospec.engine.request import Request
from evospec.engine.step import NOTHING, Batch, Decodes, DraftSlot, Proposals, ScheduledSequence

OUTPUT_TOKEN_SERVICE = 2 * PROMPT_TOKEN_SERVICE
LEAST_CHUNK = 32
"""Tokens of prompts that a step reads however long it takes, if there are as many."""


class QueueFull(Exception):
    """Too many requests wait; try again later."""


class RequestTooLong(ValueError):
    """The request can never be served: prompt and output exceed the model's length or the whole KV cache."""


class Scheduler:
    """Owns all requests, waiting and running.

    A step has ``max_batched_tokens`` tokens to give away, in this order: one to each sequence that decodes; chunks to
    running prefills; draft tokens; then new requests (``Admission``) while sequences and blocks last. While prefill
    work is there, drafts get at most half of what the decodes leave; while a prefill is unfinished, short new prompts
    get up to half of the rest, so that they need not wait for it. Beside decodes, and where all requests are synthetic,
    prompts get as many tokens as take ``prompt_ms`` milliseconds, but at least ``LEAST_CHUNK``.

    ``window`` and ``reads_prompts_apart``: as for ``KVCacheManager``. The sequences of which a step computes the prompt
    come last.

    It knows nothing of who drafts or learns. One thread calls ``begin_step``, ``plan``, ``fill``, then ``commit`` or
    ``postpone`` for each of the sequences, which does nothing for one that was aborted meanwhile.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        num_blocks: int,
        max_model_len: int,
        window: int | None = None,
        reads_prompts_apart: bool = False,
    ) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._kv = KVCacheManager(num_blocks, cache.block_size, cache.prefix_caching, window, reads_prompts_apart)
        self.requests: dict[str, Request] = {}
        """All, by their ids."""
        # Decodes can never claim more than half of a step, so prefill always goes on.
        self._max_running = min(config.max_num_seqs, config.max_batched_tokens // 2)
        self._admission = Admission(self._kv, self._max_running)
        self._waiting, self._running = self._admission.waiting, self._admission.running
        self._step_time = StepTime()
        self._lacks_blocks = False
        """Whether waiting requests cannot be admitted for lack of blocks, as of the last step."""

    def add(self, request: Request) -> None:
        """Queue a new request.

        Raises:
            RequestTooLong: it could not be served even alone.
            QueueFull: ``max_waiting`` requests wait already, and of its tenant an equal share of them; or it is
                synthetic, and others are not.
            ValueError: a request with the same id is here.
        """
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id!r} is here already")
        self._check_length(request)
        if request.is_synthetic and self.requests and not self._is_synthetic:
            raise QueueFull("the engine is not idle")
        most = self._config.max_waiting
        if len(self._waiting) >= most and self._waiting.has_share(request.tenant, most):
            raise QueueFull(f"{len(self._waiting)} requests are waiting")
        self.requests[request.request_id] = request
        self._waiting.append(request, is_idle=request.tenant not in self._running.tenants)

    def in_the_way_of(self, request: Request) -> list[Request]:
        """The requests that have to end before this one is added: all, where they are synthetic and it is not."""
        return [*self.requests.values()] if self._is_synthetic and not request.is_synthetic else []

    def abort(self, request_id: str) -> Request | None:
        """Forget a request and free its blocks; None if it is not here (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            if request in self._running:
                self._finish(request)
            else:
                self._waiting.remove(request)
                del self.requests[request_id]
        return request

    def begin_step(self) -> Decodes:
        """Who decodes in the next step: each gets a slot for its next token, and may take another's block for it."""
        self._admission.begin_step()
        decoding = self._decoding()
        for request in decoding:
            self._admission.grow(request)
        self._admission.admit_next_in_line({request.tenant for request in self._prefilling(decoding)})
        for request in self._admission.preempted:
            decoding.pop(request, None)
        limits = [request.max_kv_tokens - request.num_tokens for request in decoding]
        return Decodes(list(decoding), limits, self._num_joining(len(decoding)))

    def plan(self, decodes: Decodes, lengths: Sequence[int]) -> list[DraftSlot]:
        """Give each sequence that decodes room for as many drafts as ``lengths`` says, where blocks are free.

        Together they get at most the tokens that the decodes leave, and the rows of logits that there may be, or half
        of them where there is prefill work, in equal parts.
        """
        budget = min(self._config.max_batched_tokens - len(decodes.requests), self._config.most_extra_rows)
        if decodes.num_joining:
            budget //= 2
        num_drafting = sum(length > 0 for length in lengths)
        slots: list[DraftSlot] = []
        for request, limit, length in zip(decodes.requests, decodes.limits, lengths, strict=True):
            room = 0
            if length > 0:
                room = min(length, limit, -(-budget // num_drafting))
                if not self._kv.allocate(request, request.num_tokens + room):
                    room = self._kv.num_slots(request) - request.num_tokens
                num_drafting -= 1
                budget -= room
            slots.append(DraftSlot(request, room, request.block_ids))
        return slots

    def fill(self, slots: Sequence[DraftSlot], proposals: Proposals) -> Batch:
        """Choose the rest of the step's tokens, now that its drafts are made, and allocate their blocks."""
        plan = {slot.request: 1 + len(proposals.get(slot.request, NOTHING).token_ids) for slot in slots}
        has_prefills = len(plan) < len(self._running) and bool(self._prefilling(plan))  # the preempted are in neither
        num_decoded, num_drafts = sum(plan.values()), sum(plan.values()) - len(plan)
        budget = self._prompt_tokens(num_decoded)
        if has_prefills:
            budget -= self._plan_newcomers(plan, num_drafts, budget // 2, whole=True)
            budget -= self._plan_prefills(plan, num_drafts, budget)
        self._plan_newcomers(plan, num_drafts, budget, whole=False)
        self._lacks_blocks = self._admission.lacks_blocks
        sequences = [ScheduledSequence.of(one, count, proposals.get(one, NOTHING)) for one, count in plan.items()]
        num_tokens = sum(plan.values())
        if num_tokens > num_decoded:
            sequences.sort(key=lambda sequence: not sequence.decodes)
        return Batch(sequences, num_tokens, num_tokens - num_decoded, self._admission.preempted)

    def commit(self, sequence: ScheduledSequence, kept_token_ids: list[int], finished: bool) -> None:
        """Take the result of a step for one sequence.

        Args:
            sequence: as scheduled.
            kept_token_ids: the accepted draft tokens, then the new token; possibly truncated if ``finished``. Empty
                while prefill is unfinished: ``ValueError`` if it is not.
            finished: the sequence is over; its blocks are freed.
        """
        request = sequence.request
        if not self._is_here(request):
            return
        # All kept tokens but the last are accepted drafts, whose KV this step has written.
        num_computed = sequence.start + sequence.num_known
        if kept_token_ids:
            num_computed += len(kept_token_ids) - 1
            request.output_token_ids += kept_token_ids
            request.all_token_ids += kept_token_ids
            self._waiting.charge(request.tenant, OUTPUT_TOKEN_SERVICE * len(kept_token_ids))
        elif not finished and num_computed >= request.num_tokens:
            raise ValueError(f"request {request.request_id!r} needs a new token")
        request.num_computed_tokens = num_computed
        self._kv.after_commit(request)
        if finished:
            self._finish(request)

    def postpone(self, sequence: ScheduledSequence) -> None:
        """Take the result of a step for a sequence computed to its end, from whose rows no token could be chosen.

        Its drafts are dropped, and its last known token is computed again in a later step.
        """
        request = sequence.request
        if self._is_here(request):
            request.num_computed_tokens = sequence.start + sequence.num_known - 1
            self._kv.after_commit(request)

    def record_seconds(self, batch: Batch, seconds: float) -> None:
        """What a step took: those with prompts tell how much of them the next ones may read."""
        if batch.num_prompt_tokens:
            self._step_time.record(batch.num_tokens, seconds)

    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.requests)

    def stats(self) -> EngineStats:
        """Gauges now, counters since the start."""
        return EngineStats(
            num_waiting=0 if self._is_synthetic else len(self._waiting),
            num_running=0 if self._is_synthetic else len(self._running),
            blocks_used=self._kv.num_used_blocks,
            blocks_total=self._kv.num_blocks,
            prefix_query_tokens=self._admission.prefix_query_tokens,
            prefix_hit_tokens=self._admission.prefix_hit_tokens,
            preemptions=self._admission.num_preemptions,
            waiting_by_tenant={} if self._is_synthetic else self._waiting.waiting_by_tenant(),
        )

    @property
    def _is_synthetic(self) -> bool:
        """Whether there are requests, and nobody waits for them: all of them are synthetic, or none is."""
        return next((request.is_synthetic for request in self.requests.values()), False)

    def _is_here(self, request: Request) -> bool:
        return self.requests.get(request.request_id) is request

    def _check_length(self, request: Request) -> None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= self._max_model_len:
            raise RequestTooLong(
                f"the prompt has {num_prompt} tokens; with at least one token of output the model's "
                f"limit is {self._max_model_len}"
            )
        request.max_kv_tokens = min(num_prompt + max(request.sampling.max_tokens, 1), self._max_model_len) - 1
        num_slots = self._kv.num_blocks * self._kv.block_size
        if request.max_kv_tokens > num_slots:
            raise RequestTooLong(
                f"prompt ({num_prompt} tokens) and max_tokens ({request.sampling.max_tokens}) "
                f"exceed the whole KV cache of {num_slots} tokens"
            )

    def _decoding(self) -> dict[Request, None]:
        """The running sequences that lack just one token, which is not of their prompt."""
        return dict.fromkeys(
            request
            for request in self._running
            if request.num_tokens - 1 == request.num_computed_tokens >= len(request.prompt_token_ids)
            and not request.is_stalled
        )

    def _prefilling(self, planned: Container[Request]) -> list[Request]:
        """Running sequences that do not decode."""
        return [request for request in self._running if request not in planned and not request.is_stalled]

    def _num_joining(self, num_decoding: int) -> int:
        """Sequences whose prompts are computed in this step or next: they will decode beside those that do."""
        num_stalled = sum(request.is_stalled for request in self._running)
        num_admissible = 0 if self._lacks_blocks else len(self._waiting)
        return min(len(self._running) + num_admissible, self._max_running) - num_stalled - num_decoding

    def _prompt_tokens(self, num_decoded: int) -> int:
        """Tokens that prompts get in a step that has so many others."""
        left = self._config.max_batched_tokens - num_decoded
        is_short = num_decoded or self._is_synthetic  # somebody may come at any time
        in_time = self._step_time.tokens_in(self._config.prompt_ms / 1e3) if is_short else None
        return left if in_time is None else min(left, max(in_time, LEAST_CHUNK))

    def _plan_prefills(self, plan: dict[Request, int], num_drafts: int, budget: int) -> int:
        """Next chunks of running prefills; returns the tokens planned."""
        lengths = {request: self._kv.num_computable(request) for request in self._prefilling(plan)}
        num_rows = prompt_rows_left(plan, num_drafts, self._config.most_extra_rows)
        chunks = share_out(lengths, budget, num_rows) if lengths else {}
        plan.update(chunks)
        return sum(chunks.values())

    def _plan_newcomers(self, plan: dict[Request, int], num_drafts: int, budget: int, whole: bool) -> int:
        """Waiting requests that are admitted now; returns the tokens planned."""
        if not self._waiting:
            return 0
        num_rows = prompt_rows_left(plan, num_drafts, self._config.most_extra_rows)
        admitted = self._admission.admit(budget, num_rows // 2 if whole else num_rows, whole)
        plan.update(admitted)
        return sum(admitted.values())

    def _finish(self, request: Request) -> None:
        self._running.remove(request)
        self._kv.free(request)
        del self.requests[request.request_id]
