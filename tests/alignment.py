"""Engines that log for online alignment: their options, prompts for them, and what they logged."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest
import torch

from benchmarks.distillation import whole_draft
from evospec.engine.adapters_config import AdaptersConfig, TokenLogConfig
from evospec.engine.online.token_log import TokenLogReader
from evospec.engine.online.verify_record import VerifyRecord
from evospec.engine.speculation import build


def make_alignment(directory: Path, url: str, method: str) -> AdaptersConfig:
    """``method``: ``lora``, or ``whole`` for drafts exchanged whole (``benchmarks.distillation.whole_draft``)."""
    is_whole = method == "whole"
    stream, control = f"log-{uuid.uuid4()}", 0.0 if is_whole else 0.2
    return AdaptersConfig(
        enabled=True,
        shared_directory=directory,
        redis_url=url,
        rank=4,
        num_slots=4,
        key_scope="global" if is_whole else "tenant",
        log=TokenLogConfig(
            stream=stream, sample_share=1.0, cost_share=1.0, control_share=control, top_k=8, interval_seconds=0.05
        ),
    )


def exchange_whole_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines that are made from now on do so."""
    monkeypatch.setattr(build, "EagleAdapters", whole_draft.DistilledDraft)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (n,), generator=generator).tolist() for n in (90, 1, 7, 15, 16, 17, 60, 33, 5)]


def read_records(config: AdaptersConfig, count: int) -> list[VerifyRecord]:
    assert config.redis_url is not None
    reader = TokenLogReader(config.redis_url, config.log.stream)
    records: list[VerifyRecord] = []
    for _ in range(500):
        records += [entry.record for entry in reader.read(1000)]
        if len(records) >= count:
            break
        time.sleep(0.02)
    reader.close()
    assert len(records) == count
    return records
