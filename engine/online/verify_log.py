"""What the engine writes down of its verify steps for the adapters worker: docs/token-log.md."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from evospec.engine.draft_vocab.vocab import TOP_K
from evospec.engine.learner import Learner
from evospec.engine.messages import AlignmentStats, EngineStats
from evospec.engine.online.adapters import Assignment, EagleAdapters
from evospec.engine.online.run_writer import RunWriter
from evospec.engine.online.verify_record import UnwrittenSteps, VerifyRecord, pack_top_k
from evospec.engine.request import Request
from evospec.engine.step import Step, StepClock, Verification
from evospec.kernels.native import Team

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


class VerifyLog(Learner):
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

    part = "log"

    def __init__(self, adapters: EagleAdapters, writer: RunWriter, team: Team | None = None) -> None:
        self._adapters, self._writer, self._team, self._options = adapters, writer, team, adapters.config.log
        self._budget = TimeBudget(self._options.cost_share, _SAVED_SECONDS)
        self._random = random.Random()
        self._are_logged: dict[Request, bool] = {}
        """Whether the steps of each request are; decided at the first."""
        self._unwritten: dict[Request, UnwrittenSteps] = {}
        """The last steps of requests that are to be logged."""
        self._num_steps = self._num_hard = self._num_sampled = 0

    @torch.inference_mode()
    def learn(self, step: Step) -> None:
        """Log of a step what is worth it, once its features are stored."""
        steps = [one for one in step.verified if one.kept]
        self._num_steps += len(steps)
        logged = [one for one in steps if self._is_logged(one.request)]
        if not logged:
            return
        started = time.perf_counter()
        k, rows = self._options.top_k, [row for one in steps for row in one.rows]  # refused drafts have others
        logits, ids = step.top_k(rows, max(k, TOP_K), self._team)
        self._log_steps(steps, logits[:, :k].astype(np.float16), ids[:, :k])
        if not logged[0].request.is_synthetic:
            self._budget.spend(time.perf_counter() - started)

    def measured(self, step: Step, clock: StepClock) -> None:
        self._budget.earn(clock.seconds)

    def preempt(self, request: Request) -> None:
        """A request loses its blocks: its last steps are written."""
        if request in self._unwritten:
            self._write([request])

    def end(self, request: Request) -> None:
        self.preempt(request)
        self._are_logged.pop(request, None)
        self._writer.forget(request)

    def _log_steps(self, steps: Sequence[Verification], logits: NDArray[np.float16], ids: NDArray[np.int32]) -> None:
        """Those worth it; ``logits`` and ``ids`` [n, k] are the target's most likely tokens after each kept one."""
        now, is_time, end = time.monotonic(), False, 0
        for one in steps:
            first, end = end, end + len(one.kept)
            request = one.request
            if not self._are_logged.get(request):
                continue
            is_sampled, assignment = self._is_sampled(request), self._adapters.assignment(request)
            record = _record(one, assignment, is_sampled, ids[first:end], logits[first:end])
            unwritten = self._unwritten.get(request)
            if unwritten is not None and unwritten.next_position != record.position:
                self._write([request])
                unwritten = None
            if is_sampled or record.teaches(self._options.kl_threshold):
                self._num_hard += not is_sampled
                self._num_sampled += is_sampled
                if unwritten is None:
                    unwritten = self._unwritten[request] = UnwrittenSteps(began_at=now)
                unwritten.add(record, one.sequence.block_ids)
            if unwritten is not None:
                is_last = one.truncation is not None and one.truncation.finish_reason is not None
                is_time |= is_last or unwritten.are_enough(now, self._writer.max_block)
        if is_time:
            self._write([one.request for one in steps])

    def _write(self, requests: Sequence[Request]) -> None:
        """All steps of requests that wait for it."""
        runs = [(request, steps) for request in requests if (steps := self._unwritten.pop(request, None)) is not None]
        self._writer.write(runs)

    def add_stats(self, stats: EngineStats) -> EngineStats:
        return msgspec.structs.replace(stats, alignment=self.stats())

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
        is_logged = self._are_logged.get(request)
        if is_logged is None:
            has_room = request.is_synthetic or self._adapters.is_control(request) or self._budget.is_left()
            is_logged = self._are_logged[request] = request.learn and has_room
        return is_logged

    def _is_sampled(self, request: Request) -> bool:
        # The guard compares adapters with control requests, of which there are few: it gets all of their steps.
        return self._random.random() < self._options.sample_share or self._adapters.is_control(request)


def _record(
    one: Verification,
    assignment: Assignment,
    is_sampled: bool,
    ids: NDArray[np.int32],
    logits: NDArray[np.float16],
) -> VerifyRecord:
    """What a step says by itself.

    ``assignment``: who drafted; ``ids`` and ``logits`` [n, k]: the target's most likely tokens at each kept one.
    """
    sequence, request, proposal = one.sequence, one.request, one.sequence.proposal
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
        first_right=None if proposal.is_copied or not proposal.drafted else one.outcomes(proposal.drafted)[0],
        is_synthetic=request.is_synthetic,
    )
