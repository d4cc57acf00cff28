"""What a step costs on this machine, measured once at start-up."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import structlog
import torch

from evospec.engine.batch import Features
from evospec.engine.config import EngineConfig
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.messages import SamplingParams
from evospec.engine.model_runner import ModelRunner
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.base import Proposer
from evospec.engine.speculation.length.costs import Curve, StepCosts, without_spikes
from evospec.engine.step import NOTHING, Batch, DraftSlot, Proposals, ScheduledSequence, Step, Verification
from evospec.kernels.choose_tokens import choose_tokens

log = structlog.get_logger(__name__)

_MOST_RUNS, _SECONDS_EACH = 12, 0.06
"""Of each size, where the first run is not counted: it may record a GPU's graphs. A size is run twice at least."""
_READINGS = 3
_PROMPT_TOKENS = 2
_READ_TOKENS = 128
_CONTEXT_TOKENS = 256
"""Before the tokens that are verified: attention is a good part of what each further one costs."""
_MANY_DRAFTS = 3
_VERIFIED_EACH = 4
"""Most tokens of a sequence that are verified."""
_GREEDY = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
_VERIFY_SIZES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
_BATCH_SIZES = (1, 4, 16, 32)
_MANY_TOKENS = 8
"""From so many on a step is bound by arithmetic, where it is not flat."""
_LOGGED_SIZES = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64)
_WARM_UP_SECONDS = 0.5
_FIRST_SECONDS = 0.5
"""For the first run at each size of a table. Sizes for which that has no time lie on the line through the last two."""
_RECORDING_SECONDS = 20.0
"""The same on a GPU, where a first run records the graphs that its size will need."""


class CostMeter:
    """Runs made-up sequences, whose tails are full, through target and draft.

    Call before any request: it writes to all KV blocks' slots.
    """

    def __init__(
        self,
        runner: ModelRunner,
        proposer: Proposer,
        config: EngineConfig,
        max_model_len: int,
        vocab: DraftVocab | None,
    ) -> None:
        self._runner, self._proposer, self._vocab = runner, proposer, vocab
        block_size, self._max_tokens = config.cache.block_size, config.scheduler.max_batched_tokens
        longest = _PROMPT_TOKENS + 1 + 2 * 2 + _MANY_DRAFTS
        self._blocks_each = -(-longest // block_size)
        self._max_batch = runner.num_blocks // self._blocks_each
        room = min(max_model_len, runner.num_blocks * block_size) - _VERIFIED_EACH
        self._context = max(min(_CONTEXT_TOKENS, room), 0)
        self._blocks_verified = -(-(self._context + _VERIFIED_EACH) // block_size)

    @torch.inference_mode()
    def measure(self) -> StepCosts:
        """The fastest of some runs at each size; logged, for they say whether drafts can pay on this machine."""
        most_sequences = min(self._max_tokens // _PROMPT_TOKENS, self._max_batch)
        most_verified = min(self._max_tokens, _VERIFIED_EACH * self._max_batch)
        batch_sizes = [size for size in _BATCH_SIZES if size <= most_sequences]
        verify_sizes = [size for size in _VERIFY_SIZES if size <= most_verified]
        self._warm_up()
        tables = (batch_sizes, self._draft_seconds), (verify_sizes, self._verify_seconds)
        limit = _RECORDING_SECONDS if torch.cuda.is_initialized() else _FIRST_SECONDS  # type: ignore[no-untyped-call]
        drafts, verified = _fastest(*tables, limit=limit)
        first = [(size, one + learning) for size, (one, learning, _) in drafts]
        further = [(size, max(many - one, 0.0) / (_MANY_DRAFTS - 1)) for size, (one, _, many) in drafts]
        costs = StepCosts(
            verify=Curve(without_spikes([(size, seconds) for size, (seconds,) in verified], _MANY_TOKENS)),
            first_draft=Curve(without_spikes(first)),
            next_draft=Curve(without_spikes(further)),
            read=self._read_seconds(first[0][1]),
        )
        curves = {name: curve for name, curve in vars(costs).items() if isinstance(curve, Curve)}
        by_size = {name: {size: round(1e3 * of(size), 3) for size in _LOGGED_SIZES} for name, of in curves.items()}
        log.info("step costs in ms by tokens or sequences", **by_size, read=round(1e3 * costs.read, 3))
        return costs

    def _warm_up(self) -> None:
        """One step after the other, as in serving: the first dozens take up to twice as long as those that follow."""
        started = time.perf_counter()
        while time.perf_counter() - started < _WARM_UP_SECONDS:
            self._verify_seconds(1)

    def _verify_seconds(self, num_tokens: int) -> tuple[float]:
        """Sequences of up to four tokens: the target's pass, the most likely token of each row, and what a draft that
        may be wanted later keeps of them. All of that is paid for without drafts too.
        """
        steps = []
        for index in range(-(-num_tokens // _VERIFIED_EACH)):
            count = min(num_tokens - _VERIFIED_EACH * index, _VERIFIED_EACH)
            request = Request(f"cost meter {index}", b"", "", _GREEDY, [1])
            # Where blocks are few, sequences share some: what is in them is made up.
            first = index * self._blocks_verified
            numbers = range(first, first + self._blocks_verified)
            blocks = array("i", (number % self._runner.num_blocks for number in numbers))
            steps.append(ScheduledSequence(request, self._context, [1] * count, count - 1, 0, count, blocks))

        def run() -> None:
            logits, features = self._runner.execute(steps, self._proposer.capture_layers)
            choose_tokens(logits, None, [0] * len(logits), team=self._runner.team)
            self._proposer.learn(_verified(steps, logits, features))

        seconds = _seconds(run)
        for step in steps:
            self._proposer.end(step.request)
        return (seconds,)

    def _draft_seconds(self, batch_size: int) -> tuple[float, float, float]:
        """One draft token for each sequence, what their vocabularies learn of it, and ``_MANY_DRAFTS`` tokens."""
        requests = self._requests(batch_size)
        if self._vocab is not None:
            self._vocab.warm_up(requests)
        self._step([ScheduledSequence.of(request, request.num_tokens) for request in requests])
        for _ in range(2):  # the prompts are read first
            one, proposals = self._propose(requests, 1)
            learning = self._verify(requests, proposals)
        many, _ = self._propose(requests, _MANY_DRAFTS)
        self._forget(requests)
        return one, learning, many

    def _read_seconds(self, first_draft: float) -> float:
        """Of each token that a new sequence has, given what its first draft takes when they are read."""
        count = max(min(_READ_TOKENS, self._context), 1)
        prompt = [place * self._runner.vocab_size // count for place in range(count)]  # so that vocabularies want them
        blocks = array("i", range(self._blocks_verified))
        seconds = []
        for _ in range(_READINGS):
            request = Request("cost meter", b"", "", _GREEDY, prompt, block_ids=blocks)
            learning = self._step([ScheduledSequence.of(request, count)])
            drafting, proposals = self._propose([request], 1)
            seconds.append(learning + drafting + self._verify([request], proposals))
            self._forget([request])
        return max(min(seconds) - first_draft, 0.0) / count

    def _propose(self, requests: Sequence[Request], length: int) -> tuple[float, Proposals]:
        """Seconds that drafts of so many tokens take, and these."""
        slots = [DraftSlot(request, length, request.block_ids) for request in requests]
        proposals: Proposals = {}

        def run() -> None:
            nonlocal proposals
            proposals = self._proposer.propose(slots)

        return _seconds(run), proposals

    def _verify(self, requests: Sequence[Request], proposals: Proposals) -> float:
        """A step with the drafts, none of which is accepted; returns what vocabularies take to follow."""
        drafted = [(request, proposals.get(request, NOTHING)) for request in requests]
        return self._step([ScheduledSequence.of(one, 1 + len(drafts.token_ids), drafts) for one, drafts in drafted])

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._proposer.end(request)
            if self._vocab is not None:
                self._vocab.end(request)
                self._vocab.texts.end(request)

    def _step(self, steps: Sequence[ScheduledSequence]) -> float:
        """Compute and commit one new token for each; returns the seconds that their vocabularies took to follow."""
        logits, features = self._runner.execute(steps, self._proposer.capture_layers)
        verified = _verified(steps, logits, features)
        self._proposer.learn(verified)
        vocab = self._vocab
        seconds = 0.0 if vocab is None else _seconds(lambda: vocab.learn(verified))
        for sequence in steps:
            request = sequence.request
            request.num_computed_tokens = request.num_tokens
            request.all_token_ids.append(1)
            request.output_token_ids.append(1)
        return seconds

    def _requests(self, count: int) -> list[Request]:
        each, prompt = self._blocks_each, [1] * _PROMPT_TOKENS
        blocks = [array("i", range(index * each, (index + 1) * each)) for index in range(count)]
        return [
            Request(f"cost meter {index}", b"", "", _GREEDY, prompt, block_ids=of_one)
            for index, of_one in enumerate(blocks)
        ]


def _verified(sequences: Sequence[ScheduledSequence], logits: torch.Tensor, features: Features | None) -> Step:
    """A step in which each sequence gets one new token, none of its drafts being right."""
    rows = accumulate((sequence.num_logits for sequence in sequences), initial=0)
    verified = [Verification(sequence, row, kept=[1]) for sequence, row in zip(sequences, rows, strict=False)]
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    return Step(Batch([*sequences], num_tokens, 0, []), verified, logits, features)


Measure = Callable[[int], tuple[float, ...]]
"""Seconds of one run at a size."""


@dataclass
class _Runs:
    """Of one size of a table."""

    size: int
    measure: Measure
    least: tuple[float, ...]
    number: int = 1
    spent: float = 0.0
    """Seconds of all runs but the first, with what is not measured of them."""

    @property
    def are_enough(self) -> bool:
        return self.number >= _MOST_RUNS or self.spent >= _SECONDS_EACH

    def again(self) -> None:
        started = time.perf_counter()
        self.least = tuple(map(min, self.least, self.measure(self.size)))
        self.spent += time.perf_counter() - started
        self.number += 1


def _fastest(
    *tables: tuple[Sequence[int], Measure], limit: float = _FIRST_SECONDS
) -> list[list[tuple[int, tuple[float, ...]]]]:
    """For each table of sizes the least of several runs at each size, of as many sizes as ``limit`` has seconds for.

    All sizes of all tables are measured in turn, again and again: a moment in which something else has the processor
    spoils one run of many sizes then, not all runs of one size, nor of one table, which are compared with each other.
    """
    for sizes, measure in tables:
        measure(sizes[0])  # a GPU's kernels are compiled, which may take longer than all runs
    measured = [_first_runs(limit, sizes, measure) for sizes, measure in tables]
    waiting = [runs for table in measured for runs in table]
    while waiting := [runs for runs in waiting if not runs.are_enough]:
        for runs in waiting:
            runs.again()
    return [[(runs.size, runs.least) for runs in table] for table in measured]


def _first_runs(limit: float, sizes: Sequence[int], measure: Measure) -> list[_Runs]:
    """At as many sizes as there is time for, and at two at least: through these goes the line to the others."""
    started = time.perf_counter()
    table: list[_Runs] = []
    for size in sizes:
        if len(table) > 1 and time.perf_counter() - started >= limit:
            break
        table.append(_Runs(size, measure, measure(size)))
    return table


def _seconds(run: Callable[[], object]) -> float:
    """Of all that it begins: a GPU goes on after the call, and is waited for before and after."""
    _await_device()
    started = time.perf_counter()
    run()
    _await_device()
    return time.perf_counter() - started


def _await_device() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
