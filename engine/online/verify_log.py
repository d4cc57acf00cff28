"""What the engine writes down of its verify steps for the adapters worker: docs/token-log.md."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from engine.messages import AlignmentStats
from engine.models.config import ModelError
from engine.online.adapters import EagleAdapters
from engine.online.feature_ring import FeatureRing
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
_SAVED_SECONDS = 0.5
"""So much of the time for logging can be saved up: after a pause a burst is logged whole."""
_CONTEXT_SECONDS = 3.0
"""After so long without a record a request's context comes again: the worker gives a silent request up after five."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step of a sequence, and whether the first token that was drafted is right (None: none, or it was copied)."""

    verified: Verification
    first_right: bool | None

    @property
    def kept(self) -> Sequence[int]:
        return self.verified.kept

    @property
    def num_accepted(self) -> int:
        return len(self.kept) - 1

    @property
    def drafted(self) -> list[int]:
        """The draft tokens; where the output stops at a right one, those before it: the rest was not looked at."""
        drafted = self.verified.sequence.draft_token_ids
        return drafted[: self.num_accepted] if self.verified.num_accepted > self.num_accepted else drafted

    @property
    def chunk(self) -> Chunk:
        """The last known token and the accepted drafts."""
        sequence, first = self.verified.sequence, self.verified.sequence.num_known - 1
        token_ids = sequence.token_ids[first : first + len(self.kept)]
        return Chunk(sequence.start + first, token_ids, 0, sequence.block_ids, sequence.request)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A step to log, and the target's top k [len(kept), k] there."""

    step: _Step
    is_hard_example: bool
    values: NDArray[np.float32]
    ids: NDArray[np.int64]


class VerifyLog:
    """Logs steps, drafted or not, and their features. It never waits: what cannot be taken is dropped and counted.

    Requests are logged whole, or not: where nothing may be learned from them, or where logging would take more than
    ``log.cost_share`` of the time. Of those, a step is logged whatever happened in it with the probability
    ``log.sample_share``; all steps of control requests are. Of the others, those are logged that teach: a draft was
    refused, or the target thought little of one that was accepted, or there was none. A request's first record, and the
    first after a while, brings along the tokens before it: its prompt, to which the draft attends.

    Args:
        adapters: who drafted.
        width: of a feature.
        features: [T, width] of the positions before the tokens of some chunks.
        prior_weights: [NUM_FEATURES] of the prior with which a request is drafted for; None: without one.
        team: threads of the compiled kernels (None: the calling one).

    Raises:
        ModelError: the ring cannot be made.
    """

    def __init__(
        self,
        adapters: EagleAdapters,
        width: int,
        features: Callable[[Sequence[Chunk]], torch.Tensor],
        prior_weights: Callable[[Request], NDArray[np.float32] | None],
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
        self._look_at = 0.0
        options = config.log
        self._log = TokenLog(
            config.redis_url, options.stream, max_records=options.max_records, interval=options.interval_seconds
        )
        self._max_context = min(config.log.context_tokens, config.log.ring_rows // 4)
        self._budget = TimeBudget(config.log.cost_share, _SAVED_SECONDS)
        self._num_lost, self._lost_at = 0, -math.inf
        """How many records were lost so far, and when the last ones were."""
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
        all_steps = [_Step(one, first_right.get(one.request.request_id)) for one in verified if one.kept]
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
        self._budget.spend(time.perf_counter() - started)
        return ids[:, :num_likely]

    def _log_steps(self, steps: Sequence[_Step], values: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        """Those worth it, of which ``values`` and ``ids`` [L, k] are the target's largest logits."""
        chosen: list[_Chosen] = []
        for step in steps:
            of_step = step.verified.rows
            is_sampled = self._is_sampled(step.verified.request)
            if is_sampled or self._teaches(step, values[of_step], ids[of_step]):
                chosen.append(_Chosen(step, not is_sampled, values[of_step], ids[of_step]))
        if not chosen:
            return
        self._look_around()
        chunks = [self._with_context(one.step) for one in chosen]
        of_chunks = self._features(chunks).cpu().split_with_sizes([len(chunk.token_ids) for chunk in chunks])
        for one, chunk, rows in zip(chosen, chunks, of_chunks, strict=True):
            try:
                place = self._ring.write(rows)
            except SharedMemoryError:  # somebody truncated it: the next look around makes another
                continue
            self._num_hard += one.is_hard_example
            self._num_sampled += not one.is_hard_example
            self._log.log(self._record(one, chunk.token_ids[: -len(one.step.kept)], *place))

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

    def _with_context(self, step: _Step) -> Chunk:
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
            state.is_logged = request.learn and (self._adapters.is_control(request) or self._budget.is_left())
        return state.is_logged

    def _is_sampled(self, request: Request) -> bool:
        # The guard compares adapters with control requests, of which there are few: it gets all of their steps.
        return self._adapters.is_control(request) or self._random.random() < self._options.sample_share

    def _teaches(self, step: _Step, values: NDArray[np.float32], ids: NDArray[np.int64]) -> bool:
        count = step.num_accepted
        if count < len(step.drafted) or not step.drafted:
            return True
        is_drafted = ids[:count] == np.array(step.drafted)[:, None]
        drafted = np.where(is_drafted, values[:count], -np.inf).max(axis=1)
        surprisals = np.logaddexp.reduce(values[:count], axis=1) - drafted
        return bool((surprisals > self._options.kl_threshold).any())

    def _record(self, chosen: _Chosen, context: Sequence[int], slot: int, generation: int) -> VerifyRecord:
        """``slot`` and ``generation``: of the rows of the context and the step's own behind them."""
        step, request = chosen.step, chosen.step.verified.request
        assignment = request.draft_state.adapter
        top_ids, top_logits = pack_top_k(chosen.ids, chosen.values)
        weights = self._prior_weights(request)
        return VerifyRecord(
            request_id=request.request_id,
            tenant=request.tenant,
            adapter_key=assignment.key,
            domain=request.domain,
            position=step.chunk.start + 1,
            last_token=step.chunk.token_ids[0],
            drafted=tuple(step.drafted),
            num_accepted=step.num_accepted,
            next_token=step.kept[-1],
            draft_version=assignment.version,
            top_k=chosen.ids.shape[1],
            top_ids=top_ids,
            top_logits=top_logits,
            is_hard_example=chosen.is_hard_example,
            feature_slot=slot + len(context),
            feature_generation=generation,
            num_features=len(step.kept),
            context=pack_ids(context),
            copied=step.verified.source == "lookup",
            first_right=step.first_right,
            prior=b"" if weights is None or not weights.any() else pack_weights(weights),
        )
