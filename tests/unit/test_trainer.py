"""The optimiser's first steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.trainer import LoraTrainer
from engine.adapters_config import AdaptersConfig, TrainingConfig
from tests.drifting_traffic import DriftingTraffic, TinyDraft

RATE = 0.01
WARMUP = 32


def test_first_updates_are_short_and_so_again_after_another_version_was_loaded(tmp_path: Path) -> None:
    """Adam's first step is as long as the rate in every weight that has a gradient."""
    tiny = TinyDraft.make(tmp_path)
    config = AdaptersConfig(rank=4, alpha=4.0, training=TrainingConfig(learning_rate=RATE))
    trainer = LoraTrainer(tiny.chains, config, "key", tiny.base)
    segments = [answer.segment() for answer in DriftingTraffic(tiny.chains).answers(2)]

    def longest() -> float:
        return max(float(weights.abs().max()) for name, weights in trainer.published().items() if name.endswith(".b"))

    for _ in range(2):
        trainer.update(segments)
        assert longest() == pytest.approx(RATE / WARMUP, rel=0.01)
        trainer.update(segments)
        assert longest() <= RATE * 3 / WARMUP * 1.01
        trainer.load(None)
