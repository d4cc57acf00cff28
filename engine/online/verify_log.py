"""What the engine writes down of its verify steps for the adapters worker: docs/token-log.md."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.draft_vocab.vocab import TOP_K, TopK
from engine.messages import AlignmentStats
from engine.online.adapters import EagleAdapters
from engine.online.logged_step import LoggedStep
from engine.online.run_writer import RunWriter
from engine.online.time_budget import TimeBudget
from engine.online.unwritten_steps import UnwrittenSteps
from engine.online.verify_record import VerifyRecord, pack_top_k
from engine.request import Request
from engine.verification import Verification
from kernels.native import Team
from kernels.topk import topk_rows_on_host

_SAVED_SECONDS = 0.2
"""So much of the time for logging is there at first, and can be saved up."""


class VerifyLog:
    """Logs steps, drafted or not, and their features. It never waits: what cannot be taken is dropped and counted.

    Requests are logged whole, or not: where nothing may be learned from them, or, but for synthetic ones, where logging
    would take more than ``log.cost_share`` of the steps' time. Of those, a step is logged whatever happened in it with
    the probability ``log.sample_share``; all steps of control requests are. Of the others, those are logged that teach:
    a draft was refused, or the target thought little of one that was accepted, or there was none. The steps of a
    request are written several at a time, those of the others along with them.

    Args:
        adapters: who drafted.
        writer: where the steps go.
        team: threads of the compiled kernels (None: the calling one).
    """

    def __init__(self, adapters: EagleAdapters, writer: RunWriter, team: Team | None = None) -> None:
        self._adapters, self._writer, self._team, self._options = adapters, writer, team, adapters.config.log
        self._budget = TimeBudget(self._options.cost_share, _SAVED_SECONDS)
        self._random = random.Random()
        self._num_steps = self._num_hard = self._num_sampled = 0

    @torch.inference_mode()
    def write(
        self,
        verified: Sequence[Verification],
        logits: torch.Tensor,
        first_right: Mapping[str, bool | None],
    ) -> TopK | None:
        """Log of a step what is worth it, once its features are stored and before it is committed.

        Args:
            verified: all sequences of the step.
            logits: [L, vocab] float32, as the target has computed them.
            first_right: of the requests that were drafted for, whatever of that was verified, whether the first token
                is the target's choice (None: it was copied).

        Returns:
            the target's most likely tokens at rows from which kept ones were chosen; None where nothing is logged.
        """
        steps = [LoggedStep(one, first_right.get(one.request.request_id)) for one in verified if one.kept]
        self._num_steps += len(steps)
        logged = [step for step in steps if self._is_logged(step.verified.request)]
        if not logged:
            return None
        started = time.perf_counter()
        k, most = self._options.top_k, max(self._options.top_k, TOP_K)
        rows = [row for step in steps for row in step.verified.rows]  # refused drafts have others
        values, token_ids = topk_rows_on_host(logits, most, self._team, rows)
        ids = token_ids.astype(np.int32)
        self._log_steps(steps, values[:, :k].astype(np.float16), ids[:, :k])
        if not logged[0].verified.request.is_synthetic:
            self._budget.spend(time.perf_counter() - started)
        return _likely(rows, ids[:, :TOP_K])

    def record_step(self, seconds: float) -> None:
        """A step took so long."""
        self._budget.earn(seconds)

    def forget(self, request: Request) -> None:
        """A request has ended, or loses its blocks: its last steps are written."""
        if request.draft_state.unwritten is not None:
            self._write([request])

    def _log_steps(self, steps: Sequence[LoggedStep], logits: NDArray[np.float16], ids: NDArray[np.int32]) -> None:
        """Those worth it; ``logits`` and ``ids`` [n, k] are the target's most likely tokens after each kept one."""
        now, is_time, end = time.monotonic(), False, 0
        for step in steps:
            first, end = end, end + len(step.kept)
            request = step.verified.request
            state = request.draft_state
            if not state.is_logged:
                continue
            if state.unwritten is not None and state.unwritten.next_position != step.position:
                self._write([request])
            is_sampled = self._is_sampled(request)
            if is_sampled or self._teaches(step, logits[first:end], ids[first:end]):
                self._num_hard += not is_sampled
                self._num_sampled += is_sampled
                state.unwritten = state.unwritten or UnwrittenSteps(began_at=now)
                record = _record(step, is_sampled, pack_top_k(ids[first:end], logits[first:end]))
                state.unwritten.add(record, step.verified.sequence.block_ids)
            if state.unwritten is not None:
                is_time |= step.is_last or state.unwritten.are_enough(now)
        if is_time:
            self._write([step.verified.request for step in steps])

    def _write(self, requests: Sequence[Request]) -> None:
        """All steps of requests that wait for it."""
        runs = [(request, steps) for request in requests if (steps := request.draft_state.unwritten) is not None]
        self._writer.write(runs)
        for request, _ in runs:
            request.draft_state.unwritten = None

    def stats(self) -> AlignmentStats:
        """For metrics."""
        written = self._writer.stats()
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

    def _is_logged(self, request: Request) -> bool:
        state = request.draft_state
        if state.is_logged is None:
            has_room = request.is_synthetic or self._adapters.is_control(request) or self._budget.is_left()
            state.is_logged = request.learn and has_room
        return state.is_logged

    def _is_sampled(self, request: Request) -> bool:
        # The guard compares adapters with control requests, of which there are few: it gets all of their steps.
        return self._random.random() < self._options.sample_share or self._adapters.is_control(request)

    def _teaches(self, step: LoggedStep, logits: NDArray[np.float16], ids: NDArray[np.int32]) -> bool:
        count = step.num_accepted
        if count < len(step.drafted) or not step.drafted:
            return True
        is_drafted = ids[:count] == np.array(step.drafted)[:, None]
        known = logits[:count].astype(np.float32)
        drafted = np.where(is_drafted, known, -np.inf).max(axis=1)
        surprisals = np.logaddexp.reduce(known, axis=1) - drafted
        return bool((surprisals > self._options.kl_threshold).any())


def _record(step: LoggedStep, is_sampled: bool, top: tuple[bytes, bytes]) -> VerifyRecord:
    """What a step says by itself; ``top``: the target's most likely tokens and their logits."""
    request, own, assignment = step.verified.request, len(step.kept), step.verified.request.draft_state.adapter
    top_ids, top_logits = top
    return VerifyRecord(
        request_id=request.request_id,
        tenant=request.tenant,
        adapter_key=assignment.key,
        domain=request.domain,
        position=step.position,
        last_token=step.last_token,
        drafted=tuple(step.drafted),
        num_accepted=step.num_accepted,
        next_token=step.kept[-1],
        draft_version=assignment.version,
        top_k=len(top_ids) // (4 * own),
        top_ids=top_ids,
        top_logits=top_logits,
        is_hard_example=not is_sampled,
        feature_slot=0,
        feature_generation=0,
        num_features=own,
        copied=step.verified.source == "lookup",
        first_right=step.first_right,
        is_synthetic=request.is_synthetic,
    )


def _likely(rows: Sequence[int], token_ids: NDArray[np.int32]) -> TopK:
    """Looks up token ids [n, TOP_K] of so many rows of the logits."""

    def find(wanted: Sequence[int]) -> NDArray[np.int32]:
        place = {row: number for number, row in enumerate(rows)}
        return token_ids[[place[row] for row in wanted]]

    return find
