"""What the engine writes down of its verify steps for the adapters worker: docs/token-log.md."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from engine.messages import AlignmentStats
from engine.models.config import ModelError
from engine.online.adapters import EagleAdapters
from engine.online.feature_ring import FeatureRing
from engine.online.logged_step import LoggedStep
from engine.online.shared_file import SharedMemoryError, make_private_directory
from engine.online.time_budget import TimeBudget
from engine.online.token_log import TokenLog
from engine.online.verify_record import VerifyRecord, pack_ids, pack_top_k, pack_weights
from engine.request import Request
from engine.speculation.drafters.kv import Chunk
from engine.verification import Verification
from kernels.topk import topk_rows_on_host

if TYPE_CHECKING:
    from kernels.native import Team

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_SAVED_SECONDS = 0.2
"""So much of the time for logging is there at first, and can be saved up."""
_CONTEXT_SECONDS = 3.0
"""After so long without a record a request's context comes again: the worker gives a silent request up after five."""


class VerifyLog:
    """Logs steps, drafted or not, and their features. It never waits: what cannot be taken is dropped and counted.

    Requests are logged whole, or not: where nothing may be learned from them, or, but for synthetic ones, where logging
    would take more than ``log.cost_share`` of the steps' time. Of those, a step is logged whatever happened in it with
    the probability ``log.sample_share``; all steps of control requests are. Of the others, those are logged that teach:
    a draft was refused, or the target thought little of one that was accepted, or there was none. A request's first
    record, and the first after a while, brings along the tokens before it: its prompt, to which the draft attends.

    Args:
        adapters: who drafted.
        width: of a feature.
        features: [T, width] of the positions before the tokens of some chunks.
        prior_weights: [n, NUM_FEATURES] of the priors with which some requests are drafted for; None: without priors.
        team: threads of the compiled kernels (None: the calling one).

    Raises:
        ModelError: the ring cannot be made.
    """

    def __init__(
        self,
        adapters: EagleAdapters,
        width: int,
        features: Callable[[Sequence[Chunk]], torch.Tensor],
        prior_weights: Callable[[Sequence[Request]], NDArray[np.float32] | None],
        team: Team | None = None,
    ) -> None:
        config = adapters.config
        assert config.redis_url is not None, "alignment is on"
        self._adapters, self._features, self._prior_weights = adapters, features, prior_weights
        self._team, self._options = team, config.log
        self._make_ring = partial(FeatureRing, config.ring_path, config.log.ring_rows, width)
        try:
            self._ring = self._make_ring()
        except SharedMemoryError as error:
            raise ModelError(f"alignment: no feature ring: {error}") from error
        self._log = TokenLog(
            config.redis_url,
            config.log.stream,
            max_records=config.log.max_records,
            interval=config.log.interval_seconds,
        )
        self._max_block = config.log.ring_rows // 4
        self._max_context = min(config.log.context_tokens, self._max_block)
        self._budget = TimeBudget(config.log.cost_share, _SAVED_SECONDS)
        self._look_at, self._num_lost, self._lost_at = 0.0, 0, -math.inf
        """When to look around, how many records were lost so far, and when the last ones were."""
        self._random = random.Random()
        self._num_steps = self._num_hard = self._num_sampled = 0

    @torch.inference_mode()
    def write(
        self,
        verified: Sequence[Verification],
        logits: torch.Tensor,
        num_likely: int,
        first_right: Mapping[str, bool | None],
    ) -> NDArray[np.int64] | None:
        """Log of a step what is worth it, once its features are stored and before it is committed.

        Args:
            verified: all sequences of the step.
            logits: [L, vocab] float32, as the target has computed them.
            num_likely: how many of the target's most likely tokens somebody else wants of each row.
            first_right: of the requests that were drafted for, whatever of that was verified, whether the first token
                is the target's choice (None: it was copied).

        Returns:
            these tokens' ids [L, num_likely], best first, in the rows from which kept tokens were chosen; None where
            there is nothing to log.
        """
        all_steps = [LoggedStep(one, first_right.get(one.request.request_id)) for one in verified if one.kept]
        self._num_steps += len(all_steps)
        steps = [step for step in all_steps if self._is_logged(step.verified.request)]
        if not steps:
            return None
        started = time.perf_counter()
        k, most = self._options.top_k, max(self._options.top_k, num_likely)
        rows = [row for step in all_steps for row in step.verified.rows]  # refused drafts have others
        values, ids = np.zeros((len(logits), most), np.float32), np.zeros((len(logits), most), np.int64)
        values[rows], ids[rows] = topk_rows_on_host(logits, most, self._team, rows)
        self._log_steps(steps, values[:, :k], ids[:, :k])
        if not steps[0].verified.request.is_synthetic:
            self._budget.spend(time.perf_counter() - started)
        return ids[:, :num_likely]

    def record_step(self, seconds: float) -> None:
        """A step took so long."""
        self._budget.earn(seconds)

    def _log_steps(self, steps: Sequence[LoggedStep], values: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        """Those worth it, of which ``values`` and ``ids`` [L, k] are the target's largest logits."""
        chosen: list[tuple[LoggedStep, bool]] = []
        for step in steps:
            of_step, is_sampled = step.verified.rows, self._is_sampled(step.verified.request)
            if is_sampled or self._teaches(step, values[of_step], ids[of_step]):
                chosen.append((step, is_sampled))
        if not chosen:
            return
        self._look_around()
        chunks = [self._with_context(step) for step, _ in chosen]
        try:
            places = self._store(self._features(chunks).cpu(), [len(chunk.token_ids) for chunk in chunks])
        except SharedMemoryError:  # somebody truncated the ring: the next look around makes another
            return
        packed_values, packed_ids = values.astype("<f2"), ids.astype("<i4")
        priors = self._priors([step.verified.request for step, _ in chosen])
        for (step, is_sampled), chunk, place, prior in zip(chosen, chunks, places, priors, strict=True):
            self._num_hard += not is_sampled
            self._num_sampled += is_sampled
            top = pack_top_k(packed_ids[(rows := step.verified.rows)], packed_values[rows])
            self._log.log(self._record(step, is_sampled, chunk, place, top, prior))

    def _store(self, rows: torch.Tensor, lengths: Sequence[int]) -> list[tuple[int, int]]:
        """Write rows [T, width] to the ring: slot of the first of each chunk of such a length, and its generation."""
        if len(rows) > self._max_block:
            return [self._ring.write(part) for part in rows.split_with_sizes(list(lengths))]
        slot, generation = self._ring.write(rows)
        return [(slot + first, generation) for first in accumulate(lengths[:-1], initial=0)]

    def _priors(self, requests: Sequence[Request]) -> list[bytes]:
        """The packed weights with which each is drafted for."""
        weights = self._prior_weights(requests)
        if weights is None:
            return [b""] * len(requests)
        return [pack_weights(row) if row.any() else b"" for row in weights]

    def _look_around(self) -> None:
        """See once a second whether records were lost, and that a worker finds the ring; if not, make another."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        written = self._log.stats()
        if self._num_lost != (lost := written.num_dropped_by_queue + written.num_dropped_by_redis):
            self._num_lost, self._lost_at = lost, now  # contexts may be among them
        if not self._ring.is_lost():
            return
        try:
            make_private_directory(self._adapters.config.shared_directory)
            self._ring = self._make_ring()
        except SharedMemoryError as error:
            log.warning("no other feature ring", reason=str(error))
        else:
            log.warning("lost feature ring replaced")

    def stats(self) -> AlignmentStats:
        """For metrics."""
        written = self._log.stats()
        return AlignmentStats(
            layout=self._adapters.layout,
            channel_version=self._adapters.version,
            versions=self._adapters.versions,
            loads=self._adapters.num_loads,
            failed_loads=self._adapters.num_failed_loads,
            steps=self._num_steps,
            records_hard=self._num_hard,
            records_sampled=self._num_sampled,
            records_written=written.num_written,
            records_dropped_by_queue=written.num_dropped_by_queue,
            records_dropped_by_redis=written.num_dropped_by_redis,
        )

    def _with_context(self, step: LoggedStep) -> Chunk:
        """The step's own tokens; the first time, and after a while without any, also those before."""
        chunk, request, now = step.chunk, step.verified.request, time.monotonic()
        state = request.draft_state
        logged_at, state.logged_at = state.logged_at, now
        if now - logged_at < _CONTEXT_SECONDS and logged_at > self._lost_at:
            return chunk
        start = max(0, chunk.start - self._max_context)
        token_ids = request.all_token_ids[start : chunk.start] + chunk.token_ids
        return Chunk(start, token_ids, 0, chunk.block_ids, request)

    def _is_logged(self, request: Request) -> bool:
        state = request.draft_state
        if state.is_logged is None:
            has_room = request.is_synthetic or self._adapters.is_control(request) or self._budget.is_left()
            state.is_logged = request.learn and has_room
        return state.is_logged

    def _is_sampled(self, request: Request) -> bool:
        # The guard compares adapters with control requests, of which there are few: it gets all of their steps.
        return self._adapters.is_control(request) or self._random.random() < self._options.sample_share

    def _teaches(self, step: LoggedStep, values: NDArray[np.float32], ids: NDArray[np.int64]) -> bool:
        count = step.num_accepted
        if count < len(step.drafted) or not step.drafted:
            return True
        is_drafted = ids[:count] == np.array(step.drafted)[:, None]
        drafted = np.where(is_drafted, values[:count], -np.inf).max(axis=1)
        surprisals = np.logaddexp.reduce(values[:count], axis=1) - drafted
        return bool((surprisals > self._options.kl_threshold).any())

    def _record(
        self,
        step: LoggedStep,
        is_sampled: bool,
        chunk: Chunk,
        place: tuple[int, int],
        top: tuple[bytes, bytes],
        prior: bytes,
    ) -> VerifyRecord:
        """``chunk``: the step's tokens, with their context before; its first features are at ``place`` of the ring."""
        request, own = step.verified.request, len(step.kept)
        assignment, (slot, generation), (top_ids, top_logits) = request.draft_state.adapter, place, top
        context = chunk.token_ids[:-own]
        return VerifyRecord(
            request_id=request.request_id,
            tenant=request.tenant,
            adapter_key=assignment.key,
            domain=request.domain,
            position=chunk.start + len(context) + 1,
            last_token=chunk.token_ids[-own],
            drafted=tuple(step.drafted),
            num_accepted=step.num_accepted,
            next_token=step.kept[-1],
            draft_version=assignment.version,
            top_k=len(top_ids) // (4 * own),
            top_ids=top_ids,
            top_logits=top_logits,
            is_hard_example=not is_sampled,
            feature_slot=slot + len(context),
            feature_generation=generation,
            num_features=own,
            context=pack_ids(context),
            copied=step.verified.source == "lookup",
            first_right=step.first_right,
            prior=prior,
            is_synthetic=request.is_synthetic,
        )
