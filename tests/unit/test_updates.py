"""The optimiser's first steps, and how many there are."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from benchmarks.distillation.full_parameters import FullParameterUpdater
from evospec.adapters.alignment import updates as updates_module
from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.chains import SegmentBatch, collate
from evospec.adapters.alignment.store import AdapterStore
from evospec.adapters.alignment.trigger import UpdateTrigger
from evospec.adapters.alignment.updates import Updater
from evospec.engine.adapters_config import AdaptersConfig, ReplayConfig, TrainingConfig
from tests.drifting_traffic import DriftingTraffic, TinyDraft

RATE = 0.01
WARMUP = 32


def test_first_updates_are_short_and_so_again_after_another_version_was_loaded(tmp_path: Path) -> None:
    """Adam's first step is as long as the rate in every weight that has a gradient."""
    tiny = TinyDraft.make(tmp_path)
    config = AdaptersConfig(rank=4, training=TrainingConfig(learning_rate=RATE))
    updater = Updater(tiny.drafter, config, "key", tiny.base)
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(2)]

    def longest() -> float:
        return max(float(weights.abs().max()) for name, weights in updater.published().items() if name.endswith(".b"))

    for _ in range(2):
        updater.update(segments)
        assert longest() == pytest.approx(0.9 * RATE / WARMUP, rel=0.01)  # nine tenths of the mean that is published
        updater.update(segments)
        assert longest() <= RATE * 3 / WARMUP * 1.01
        updater.load(None)


def test_what_is_published_does_not_follow_each_update(tmp_path: Path) -> None:
    """But ends where they lead to: different answers in turn pull to and fro, and what they share stays."""
    tiny = TinyDraft.make(tmp_path)
    config = AdaptersConfig(rank=4, training=TrainingConfig(learning_rate=RATE))
    updater = Updater(tiny.drafter, config, "key", tiny.base)
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(60)]

    def weights() -> tuple[torch.Tensor, torch.Tensor]:
        both = (updater._lora.tensors, updater.published())
        now, published = (tensors["o.b"].float().T @ tensors["o.a"].float() for tensors in both)
        return now.detach(), published

    for segment in segments:
        updater.update([segment])
    before, moved = weights(), [0.0, 0.0]
    for segment in segments:
        updater.update([segment])
        after = weights()
        moved = [sum_ + float((b - a).norm()) for sum_, a, b in zip(moved, before, after, strict=True)]
        before = after
    assert moved[1] < 0.7 * moved[0]  # rounded to bf16 each time
    assert torch.cosine_similarity(before[0].flatten(), before[1].flatten(), dim=0) > 0.7


def test_an_adapter_decays_where_nothing_holds_it(tmp_path: Path) -> None:
    """So that what other text gains from the base draft comes back; without decay it keeps what it has."""
    tiny, left = TinyDraft.make(tmp_path), list[float]()
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(2)]
    for decay in (0.0, 7.0):
        training = TrainingConfig(learning_rate=RATE, weight_decay=decay)
        updater = Updater(tiny.drafter, AdaptersConfig(rank=4, training=training), "key", tiny.base)
        with torch.no_grad():
            updater._lora.tensors["q.b"].fill_(1.0)
            updater._lora.tensors["q.a"].zero_()  # so that it adds nothing, and has no gradient
        for _ in range(WARMUP + 10):
            updater.update(segments)
        left.append(float(updater._lora.tensors["q.b"].detach().mean()))
    assert left[0] == pytest.approx(1.0, abs=0.2)
    assert left[1] < 0.5


def test_first_updates_of_the_whole_draft_are_short_too(tmp_path: Path) -> None:
    """Or a version that was refused once would be refused for good, its successors starting with a leap each time."""
    tiny = TinyDraft.make(tmp_path)
    config = AdaptersConfig(training=TrainingConfig(learning_rate=RATE))
    updater = FullParameterUpdater(tiny.drafter, config, "*", tiny.base)
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(2)]
    for _ in range(2):
        before = {name: weight.detach().clone() for name, weight in updater.trained.draft.named_parameters()}
        updater.update(segments)
        after = updater.trained.draft.named_parameters()
        moved = max(float((weight.detach() - before[name]).abs().max()) for name, weight in after)
        assert moved == pytest.approx(RATE / 100 / WARMUP, rel=0.02)
        updater.load(updater.published())


def test_update_costs_what_it_computes_however_busy_the_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate_late(*arguments: Any) -> SegmentBatch:
        time.sleep(1.0)
        return collate(*arguments)

    monkeypatch.setattr(updates_module, "collate", collate_late)
    tiny = TinyDraft.make(tmp_path)
    segments = [answer.segment() for answer in DriftingTraffic(tiny.drafter).answers(2)]
    for kind in (Updater, FullParameterUpdater):
        assert 0 < kind(tiny.drafter, AdaptersConfig(rank=4), "key", tiny.base).update(segments).seconds < 1.0


def test_each_batch_of_new_positions_brings_several_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as that pays."""
    tiny = TinyDraft.make(tmp_path)
    training = TrainingConfig(batch_positions=64, updates_per_batch=3, updates_per_version=1000)
    config = AdaptersConfig(training=training, replay=ReplayConfig(held_out_share=1e-9))
    updater = Updater(tiny.drafter, config, "key", tiny.base)
    aligner = KeyAligner("key", tiny.drafter, updater, AdapterStore(tmp_path / "store", updater.layout), config)
    traffic = DriftingTraffic(tiny.drafter)

    def updates_of_new_answers(count: int) -> int:
        before = aligner.state.num_updates
        for number, answer in enumerate(traffic.answers(count)):
            aligner.add(answer.segment(str(number)))
        while aligner.wants_work:
            aligner.work()
        return aligner.state.num_updates - before

    monkeypatch.setattr(UpdateTrigger, "pays", True)
    assert updates_of_new_answers(2) == 3
    assert updates_of_new_answers(2) == 3
    # Those of batches that came faster than they were learned from, too; half of a batch is older positions now.
    assert updates_of_new_answers(8) == 8 * 3
    monkeypatch.setattr(UpdateTrigger, "pays", False)
    assert updates_of_new_answers(2) == 0
    assert updates_of_new_answers(2) == 1


def test_an_answer_may_end_where_the_context_does(tmp_path: Path) -> None:
    """Chains that begin at its last positions go on beyond it."""
    tiny = TinyDraft.make(tmp_path)
    segment = DriftingTraffic(tiny.drafter).answers(1)[0].segment()
    config = AutoConfig.from_pretrained(tiny.model)
    last = config.max_position_embeddings - 1
    at_the_end = replace(segment, positions=segment.positions + last - segment.positions[-1])
    updater = Updater(tiny.drafter, AdaptersConfig(rank=4), "key", tiny.base)
    assert math.isfinite(updater.update([at_the_end]).loss)
