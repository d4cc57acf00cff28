"""What the engine logs of a request finds room in the smallest ring, however many of its drafts are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from evospec.engine.adapters_config import AdaptersConfig, TokenLogConfig
from evospec.engine.config import MAX_COPIED_TOKENS
from evospec.engine.messages import SamplingParams
from evospec.engine.online import run_writer, verify_record
from evospec.engine.online.adapters import BASE
from evospec.engine.online.feature_ring import FeatureRingReader
from evospec.engine.online.run_writer import RunWriter
from evospec.engine.online.token_log import TokenLogStats
from evospec.engine.online.verify_log import VerifyLog
from evospec.engine.online.verify_record import VerifyRecord
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.kv import Chunk
from evospec.engine.step import Batch, Proposal, ScheduledSequence, Step, Verification

LEAST_ROWS, WIDTH = 64, 4
NUM_PROMPT_TOKENS = 100


class CheckedLog:
    """In place of the token log: each record's rows must be in the ring when it comes. Counts records."""

    def __init__(self, *_: object, **__: object) -> None:
        self.stats = TokenLogStats()
        self.reader: FeatureRingReader | None = None
        self.contexts: list[int] = []
        """How many tokens of context came, where any did."""

    def log(self, record: VerifyRecord) -> None:
        assert self.reader is not None
        first, count = record.position - 1 - record.num_context, record.num_context + record.num_features
        slots = torch.arange(count) + record.feature_slot - record.num_context
        rows, valid = self.reader.read(slots, torch.full_like(slots, record.feature_generation))
        assert valid.all()
        assert rows[:, 0].tolist() == [position % 128 for position in range(first, first + count)]
        self.stats.num_written += 1
        if record.num_context:
            self.contexts.append(record.num_context)


def rows_of(chunks: Sequence[Chunk]) -> torch.Tensor:
    """[T, WIDTH] that tell the position."""
    positions = torch.cat([torch.arange(len(chunk.token_ids)) + chunk.start for chunk in chunks])
    return (positions % 128).float()[:, None].expand(-1, WIDTH)


@contextmanager
def logging() -> Iterator[tuple[VerifyLog, CheckedLog, Request]]:
    """Who logs with the smallest ring, what the log gets, and a request that is about to decode."""
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_writer, "TokenLog", CheckedLog)
        options = TokenLogConfig(ring_rows=LEAST_ROWS, top_k=2)
        config = AdaptersConfig(redis_url="redis://nowhere", shared_directory=Path(directory), log=options)
        writer = RunWriter(config, WIDTH, rows_of, lambda _: None)
        checked: Any = writer._log
        checked.reader = FeatureRingReader(config.ring_path)
        adapters: Any = SimpleNamespace(config=config, is_control=lambda _: True, assignment=lambda _: BASE)
        request = Request("r", b"", "t", SamplingParams(max_tokens=9, seed=0), [7] * NUM_PROMPT_TOKENS)
        request.num_computed_tokens = NUM_PROMPT_TOKENS - 1
        yield VerifyLog(adapters, writer), checked, request


def take_step(log: VerifyLog, request: Request, num_accepted: int) -> None:
    """Draft so many tokens, which are right, and commit them."""
    kept = [*[5] * num_accepted, 6]
    sequence = ScheduledSequence.of(request, len(kept), Proposal(kept[:-1]))
    verified = Verification(sequence, 0, kept=kept, num_accepted=num_accepted)
    log.learn(Step(Batch([sequence], len(kept), 0, []), [verified], torch.zeros(len(kept), 32), None))
    request.all_token_ids += kept
    request.num_computed_tokens += len(kept)


@example([0] * 15 + [MAX_COPIED_TOKENS])
@example([0] * 16 + [MAX_COPIED_TOKENS])
@example([MAX_COPIED_TOKENS] * 40)
@given(st.lists(st.integers(0, MAX_COPIED_TOKENS), min_size=1, max_size=40))
def test_steps_of_any_length_fit_into_the_smallest_ring(accepted: list[int]) -> None:
    with logging() as (log, checked, request):
        for number in accepted:
            take_step(log, request, number)
        log.end(request)
        assert checked.stats.num_written == len(accepted)


def test_what_a_broken_ring_does_not_take_is_counted_and_the_next_ring_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_record, "_STEPS_AT_ONCE", 1)
    with logging() as (log, checked, request):
        take_step(log, request, 1)
        log._writer._ring.close()
        log._writer._look_at = math.inf
        take_step(log, request, 1)
        assert (checked.stats.num_written, checked.stats.num_dropped_by_queue) == (1, 1)
        log._writer._look_at = 0.0
        take_step(log, request, 1)
        assert checked.stats.num_written == 2
        assert checked.contexts == [LEAST_ROWS // 4] * 2, "it comes again after a loss"


def test_a_smaller_ring_is_refused() -> None:
    with pytest.raises(ValidationError, match="ring_rows"):
        TokenLogConfig(ring_rows=LEAST_ROWS - 1)
