"""What the engine writes down of its verify steps for the adapters worker: docs/token-log.md."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.draft_vocab.vocab import TOP_K, TopK
from evospec.engine.messages import AlignmentStats
from evospec.engine.online.adapters import EagleAdapters
from evospec.engine.online.run_writer import RunWriter
from evospec.engine.online.verify_record import UnwrittenSteps, VerifyRecord, pack_top_k
from evospec.engine.request import Request
from evospec.engine.verification import Verification
from evospec.kernels.native import Team
from evospec.kernels.topk import topk_rows_on_host

_SAVED_SECONDS = 0.2
"""So much of the time for logging is there at first, and can be saved up."""


class TimeBudget:
    """Seconds that are earned by others' work, saved up, and spent; a spender may run into debt once.

    Args:
        share: of the seconds worked, earned.
        most: seconds that can be saved, as many as there are at first.
    """

    def __init__(self, share: float, most: float) -> None:
        self._share, self._most = share, most
        self._saved = most

    def is_left(self) -> bool:
        """Whether there is something to spend."""
        return self._saved > 0

    def earn(self, seconds: float) -> None:
        """So much was worked, what was spent included."""
        self._saved = min(self._most, self._saved + self._share * seconds)

    def spend(self, seconds: float) -> None:
        """Take away what something has cost."""
        self._saved -= seconds


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
        steps = [one for one in verified if one.kept]
        self._num_steps += len(steps)
        logged = [one for one in steps if self._is_logged(one.request)]
        if not logged:
            return None
        started = time.perf_counter()
        k, most = self._options.top_k, max(self._options.top_k, TOP_K)
        rows = [row for one in steps for row in one.rows]  # refused drafts have others
        values, token_ids = topk_rows_on_host(logits, most, self._team, rows)
        ids = token_ids.astype(np.int32)
        self._log_steps(steps, first_right, values[:, :k].astype(np.float16), ids[:, :k])
        if not logged[0].request.is_synthetic:
            self._budget.spend(time.perf_counter() - started)
        likely, place = ids[:, :TOP_K], {row: number for number, row in enumerate(rows)}
        return lambda wanted: likely[[place[row] for row in wanted]]

    def record_step(self, seconds: float) -> None:
        """A step took so long."""
        self._budget.earn(seconds)

    def forget(self, request: Request) -> None:
        """A request has ended, or loses its blocks: its last steps are written."""
        if request.draft_state.unwritten is not None:
            self._write([request])

    def _log_steps(
        self,
        steps: Sequence[Verification],
        first_right: Mapping[str, bool | None],
        logits: NDArray[np.float16],
        ids: NDArray[np.int32],
    ) -> None:
        """Those worth it; ``logits`` and ``ids`` [n, k] are the target's most likely tokens after each kept one."""
        now, is_time, end = time.monotonic(), False, 0
        for one in steps:
            first, end = end, end + len(one.kept)
            request, state = one.request, one.request.draft_state
            if not state.is_logged:
                continue
            is_sampled, is_right = self._is_sampled(request), first_right.get(request.request_id)
            record = _record(one, is_right, is_sampled, ids[first:end], logits[first:end])
            if state.unwritten is not None and state.unwritten.next_position != record.position:
                self._write([request])
            if is_sampled or record.teaches(self._options.kl_threshold):
                self._num_hard += not is_sampled
                self._num_sampled += is_sampled
                state.unwritten = state.unwritten or UnwrittenSteps(began_at=now)
                state.unwritten.add(record, one.sequence.block_ids)
            if state.unwritten is not None:
                is_last = one.truncation is not None and one.truncation.finish_reason is not None
                is_time |= is_last or state.unwritten.are_enough(now, self._writer.max_block)
        if is_time:
            self._write([one.request for one in steps])

    def _write(self, requests: Sequence[Request]) -> None:
        """All steps of requests that wait for it."""
        runs = [(request, steps) for request in requests if (steps := request.draft_state.unwritten) is not None]
        self._writer.write(runs)
        for request, _ in runs:
            request.draft_state.unwritten = None

    def stats(self) -> AlignmentStats:
        """For metrics."""
        written = self._writer.stats
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


def _record(
    one: Verification,
    first_right: bool | None,
    is_sampled: bool,
    ids: NDArray[np.int32],
    logits: NDArray[np.float16],
) -> VerifyRecord:
    """What a step says by itself; ``ids`` and ``logits`` [n, k]: the target's most likely tokens at each kept one."""
    sequence, request, assignment = one.sequence, one.request, one.request.draft_state.adapter
    num_accepted, drafted = len(one.kept) - 1, sequence.draft_token_ids
    if one.num_accepted > num_accepted:  # the output stops at a right one: the rest was not looked at
        drafted = drafted[:num_accepted]
    top_ids, top_logits = pack_top_k(ids, logits)
    return VerifyRecord(
        request_id=request.request_id,
        tenant=request.tenant,
        adapter_key=assignment.key,
        domain=request.domain,
        position=sequence.start + sequence.num_known,
        last_token=sequence.token_ids[sequence.num_known - 1],
        drafted=tuple(drafted),
        num_accepted=num_accepted,
        next_token=one.kept[-1],
        draft_version=assignment.version,
        top_k=ids.shape[1],
        top_ids=top_ids,
        top_logits=top_logits,
        is_hard_example=not is_sampled,
        feature_slot=0,
        feature_generation=0,
        num_features=len(one.kept),
        copied=one.source == "lookup",
        first_right=first_right,
        is_synthetic=request.is_synthetic,
    )
