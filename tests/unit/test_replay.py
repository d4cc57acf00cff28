"""What the worker keeps of the traffic, what it learns from, and how records become segments."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.adapters.alignment.chains import ChainStep, collate
from evospec.adapters.alignment.curriculum_loss import divergence
from evospec.adapters.alignment.records import Assembler, Segment
from evospec.adapters.alignment.replay import ReplayBuffer, starts_chains, teaches
from evospec.engine.adapters_config import ReplayConfig
from evospec.engine.online.feature_ring import FeatureRing, FeatureRingReader
from evospec.engine.online.verify_record import VerifyRecord, pack_ids, pack_top_k, pack_weights
from evospec.kernels.session_options import NUM_FEATURES

WIDTH, K, VOCAB = 4, 3, 100
NEVER_HELD_OUT = 1e-9


def segment(name: str, n: int = 5) -> Segment:
    return Segment(
        name,
        torch.arange(n),
        torch.arange(n),
        torch.zeros(n, WIDTH, dtype=torch.bfloat16),
        torch.zeros(n, K, dtype=torch.int32),
        torch.zeros(n, K, dtype=torch.float16),
        torch.full((n,), -1, dtype=torch.int32),
        torch.ones(n, dtype=torch.bool),
        torch.zeros(n, NUM_FEATURES, dtype=torch.float16),
    )


def buffer(**options: object) -> ReplayBuffer:
    settings = {"held_out_share": NEVER_HELD_OUT, "recent_segments": 4, "history_segments": 6} | options
    return ReplayBuffer(ReplayConfig.model_validate(settings))


def num_segments(replay: ReplayBuffer) -> int:
    return len(replay._recent) + len(replay._history) + len(replay.held_out)


def names(segments: list[Segment]) -> list[str]:
    return [s.request_id for s in segments]


@settings(max_examples=30)
@given(st.integers(0, 100), st.integers(1, 8), st.integers(0, 8))
def test_memory_is_bounded(count: int, recent: int, history: int) -> None:
    replay = buffer(recent_segments=recent, history_segments=history, held_out_segments=3, held_out_share=0.3)
    for number in range(count):
        replay.add(segment(str(number)))
        if number % 7 == 0:
            replay.take(5, 0.5)
    assert num_segments(replay) <= recent + history + 5  # short ones: 3 * 8 positions are kept in any case


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=100), st.integers(1, 400))
def test_rows_are_bounded_whatever_the_lengths_of_segments(lengths: list[int], most: int) -> None:
    """The newest segment of those to learn from, and of those held out, is kept, however long it is."""
    replay = buffer(held_out_segments=64, history_segments=64, held_out_share=0.3, max_rows=most)
    for number, length in enumerate(lengths):
        replay.add(segment(str(number), length))
        num_rows = sum(s.num_rows for s in (*replay._recent, *replay._history, *replay.held_out))
        assert num_rows <= most + 2 * max(lengths)


def test_more_segments_are_held_out_where_they_are_short() -> None:
    replay = buffer(held_out_segments=64, held_out_share=1 - 1e-9)
    for number in range(500):
        replay.add(segment(str(number), 3))
    assert 512 <= replay.num_held_out_positions < 520
    for number in range(500):
        replay.add(segment(str(number), 30))
    assert len(replay.held_out) == 64


def test_one_of_four_requests_is_held_out_and_never_trained_on() -> None:
    """All segments of a request, those too that come after others'."""
    replay = buffer(held_out_share=0.25, held_out_segments=1000)
    taken = set()
    for number in range(400):
        for name in {f"request-{number}", f"request-{max(0, number - 5)}"}:
            replay.add(segment(name))
        taken |= set(names(replay.take(50, 0.5)))
    held_out = {s.request_id for s in replay.held_out}
    assert not held_out & taken
    groups = [range(first, first + 4) for first in range(0, 400, 4)]
    places = [[f"request-{n}" in held_out for n in group] for group in groups]
    assert all(map(sum, places))
    assert len(held_out) == len(groups)
    assert len({tuple(place) for place in places}) == 4  # whatever the order in which traffic comes again


def test_requests_kept_in_training_are_outside_the_lot_and_no_leak() -> None:
    replay, alone = ReplayBuffer(ReplayConfig()), ReplayBuffer(ReplayConfig())
    for number in range(3000):
        replay.keep_in_training(f"written {number}")
        assert not replay.holds_out(f"written {number}")
        assert replay.holds_out(f"asked {number}") == alone.holds_out(f"asked {number}")
    assert len(replay._are_held_out) == len(alone._are_held_out) == 1024


def test_history_is_a_fair_sample_of_all_that_left() -> None:
    """Each of 60 segments is in a history of 12 in one of five runs, whenever it came (the recent 4 cannot be)."""
    counts = np.zeros(56)
    for seed in range(400):
        replay = ReplayBuffer(ReplayConfig(held_out_share=NEVER_HELD_OUT, recent_segments=4, history_segments=12), seed)
        for number in range(60):
            replay.add(segment(str(number), 1))
        while replay.take(100, 0.0):
            pass
        replay.add(segment("new", 1))
        older = {int(name) for name in names(replay.take(18, 0.9)) if name != "new"} - set(range(57, 60))
        for number in older - {56}:
            counts[number] += 1
    expected = counts.mean()
    assert ((counts - expected) ** 2 / expected).sum() < 95  # chi-square of 55 degrees, 99.9 %


def test_updates_take_new_segments_once_and_old_ones_beside_them() -> None:
    replay = buffer()
    for number in range(3):
        replay.add(segment(str(number)))
    assert replay.num_new_positions == 15
    assert names(replay.take(10, 0.0)) == ["0", "1"]
    assert (replay.num_new_positions, replay.num_arrived_positions) == (5, 0)
    batch = names(replay.take(10, 0.5))
    assert batch[0] == "2"
    assert set(batch[1:]) <= {"0", "1"}
    assert replay.take(10, 0.5) == []


def test_older_segments_alone_can_be_taken_as_often_as_wanted() -> None:
    replay = buffer()
    replay.add(segment("new"))
    assert not replay.has_older
    assert replay.take_older(5) == []
    assert names(replay.take(5, 0.5)) == ["new"]
    assert replay.has_older
    for _ in range(3):
        assert names(replay.take_older(5)) == ["new"]
    assert replay.num_new_positions == 0


def test_with_the_papers_shares_nothing_is_learned_from_twice() -> None:
    replay, taken = buffer(recent_segments=2), []
    for number in range(9):
        replay.add(segment(str(number)))
        taken += names(replay.take(5, history_share=0.0))
    assert taken == [str(number) for number in range(9)]


def record(position: int, tokens: list[int], accepted: int, slot: int = 0, generation: int = 0) -> VerifyRecord:
    """Tokens: the last one before, the accepted ones, a refused one if fewer than two were accepted; then the next."""
    drafted = tokens[1 : 1 + accepted] + ([99] if accepted < 2 else [])
    rows = accepted + 1
    ids = np.array([[tokens[i + 1], 50, 51] for i in range(rows)])
    top_ids, top_logits = pack_top_k(ids, np.tile([5.0, 1.0, 0.0], (rows, 1)))
    return VerifyRecord(
        request_id="r",
        tenant="t",
        adapter_key=None,
        domain=None,
        position=position,
        last_token=tokens[0],
        drafted=tuple(drafted),
        num_accepted=accepted,
        next_token=tokens[accepted + 1],
        draft_version=0,
        top_k=K,
        top_ids=top_ids,
        top_logits=top_logits,
        is_hard_example=True,
        feature_slot=slot,
        feature_generation=generation,
        num_features=rows,
    )


def test_gate_keeps_what_teaches() -> None:
    whole = record(1, [1, 2, 3, 4], 2)
    assert teaches(record(1, [1, 2, 3], 1), 1.0, 0.0)
    assert teaches(msgspec.structs.replace(record(1, [1, 2], 0), drafted=()), 1.0, 0.0)
    assert not teaches(whole, 1.0, 0.0)
    assert teaches(whole, 0.001, 0.0)
    assert teaches(whole, 1.0, 1.0)
    by_lot = [teaches(msgspec.structs.replace(whole, position=p), 1.0, 0.2) for p in range(1000)]
    assert 150 < sum(by_lot) < 250


def test_scores_are_of_all_that_is_logged_whatever_happens(tmp_path: Path) -> None:
    """A held-out request's fully accepted steps count, though nothing is to be learned from them."""
    log = Log(tmp_path / "ring")
    for is_hard_example in (False, True):
        for name in ("held out", "trained on"):
            made = msgspec.structs.replace(log.step(2), request_id=name, is_hard_example=is_hard_example)
            is_start = starts_chains(made, teaches(made, kl_threshold=1.0, sampled_share=0.0), name == "held out")
            log.add(made, is_teaching=is_start)
    [(_, s)] = log.assembler.flush()
    assert s.request_id == "held out"
    assert s.anchors.tolist() == [True] * 3 + [False] * 3
    assert starts_chains(made, True, False)


class Log:
    """Records of one sequence, token i being i % VOCAB and its features being i everywhere."""

    def __init__(self, path: Path, capacity: int = 64, max_rows: int = 10_000) -> None:
        self.ring = FeatureRing(path, capacity, WIDTH)
        self.reader = FeatureRingReader(path)
        config = ReplayConfig(segment_positions=10, context_positions=3, max_rows=max_rows)
        self.assembler = Assembler(config, K, VOCAB, 10_000, idle_seconds=9e9)
        self.position = 1

    def step(self, accepted: int, num_context: int = 0) -> VerifyRecord:
        """With so many tokens before it as context."""
        first = self.position - 1 - num_context
        rows = torch.arange(first, self.position + accepted, dtype=torch.float32)[:, None]
        slot, generation = self.ring.write(rows.expand(-1, WIDTH))
        tokens = [(self.position - 1 + i) % VOCAB for i in range(accepted + 2)]
        made = record(self.position, tokens, accepted, slot + num_context, generation)
        self.position += accepted + 1
        context = [token % VOCAB for token in range(first, first + num_context)]
        return msgspec.structs.replace(made, context=pack_ids(context))

    def add(self, *records: VerifyRecord, is_teaching: bool = True) -> list[Segment]:
        return [s for _, s in self.assembler.add([("key", r, is_teaching) for r in records], self.reader)]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=40), st.integers(0, 9), st.integers(0, 2**31))
def test_segments_say_of_each_position_what_was_logged(
    tmp_path_factory: pytest.TempPathFactory, accepted: list[int], num_context: int, seed: int
) -> None:
    """Whatever is lost of the log: tokens, features and targets of all positions belong together."""
    log = Log(tmp_path_factory.mktemp("ring") / "ring", 256)
    log.position += num_context
    lost = random.Random(seed)
    segments: list[Segment] = []
    kept: list[int] = []
    has_context = False
    for number, count in enumerate(accepted):
        made = log.step(count, 0 if number else num_context)
        if lost.random() < 0.8:
            has_context |= made.num_context > 0
            segments += log.add(made, made)  # delivered twice
            kept += range(made.position - 1, made.position + count)
    segments += [s for _, s in log.assembler.flush()]
    for s in segments:
        assert s.positions.tolist() == sorted(set(s.positions.tolist()))
        assert torch.equal(s.token_ids, s.positions % VOCAB)
        assert torch.equal(s.inputs[:, 0].float(), s.positions.float())
        is_known = s.top_logits[:, 0].isfinite()
        assert torch.equal(s.top_ids[is_known, 0].long(), (s.positions[is_known] + 1) % VOCAB)
        assert s.positions[~is_known].tolist() == list(range(num_context if has_context else 0))
    anchors = [p for s in segments for p in s.positions[s.anchors].tolist()]
    assert anchors == kept  # each once, context not


def test_what_is_joined_is_bounded_and_within_the_longest_sequence(tmp_path: Path) -> None:
    log = Log(tmp_path / "ring", capacity=64, max_rows=10)
    steps = [msgspec.structs.replace(log.step(2), request_id=f"{number}") for number in range(4)]
    ended = [segments for step in steps for segments in (log.add(step),) if segments]
    assert [segment.request_id for [segment] in ended] == ["0"], "with the fourth there are twelve positions"
    assert log.add(msgspec.structs.replace(log.step(2), position=9_999)) == []
    assert log.assembler.num_unusable == 1


def test_lost_rows_and_useless_records_are_counted(tmp_path: Path) -> None:
    log = Log(tmp_path / "ring", capacity=16)
    old = log.step(2)
    for _ in range(6):
        last = log.step(2)
    log.add(old, last)
    assert (log.assembler.num_lapsed, log.assembler.num_unusable) == (1, 0)
    good = log.step(1)
    broken = [
        msgspec.structs.replace(good, num_accepted=3),
        msgspec.structs.replace(good, num_features=0),
        msgspec.structs.replace(good, next_token=VOCAB),
        msgspec.structs.replace(good, top_ids=b"\xff" * len(good.top_ids)),
        msgspec.structs.replace(good, position=0),
        msgspec.structs.replace(good, context=pack_ids([VOCAB])),
        msgspec.structs.replace(good, context=pack_ids([0] * good.position)),
    ]
    log.add(*broken)
    assert (log.assembler.num_lapsed, log.assembler.num_unusable) == (1, 7)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38])
def test_features_that_are_no_numbers_are_left_out(tmp_path: Path, value: float) -> None:
    log = Log(tmp_path / "ring")
    damaged = log.step(2)
    row = torch.empty(1, log.reader.width, dtype=torch.bfloat16)
    log.reader._ring.read_rows(damaged.feature_slot + 1, row)
    row[0, 2] = value
    log.ring._ring.write_rows(damaged.feature_slot + 1, row)
    log.add(damaged, log.step(1))
    [(_, s)] = log.assembler.flush()
    assert s.positions.tolist() == [3, 4]
    assert (log.assembler.num_lapsed, log.assembler.num_unusable) == (0, 1)


def test_step_without_a_draft_leaves_no_hole(tmp_path: Path) -> None:
    log = Log(tmp_path / "ring")
    steps = [log.step(2), msgspec.structs.replace(log.step(0), drafted=()), log.step(1)]
    log.add(*steps)
    [(_, s)] = log.assembler.flush()
    assert s.positions.tolist() == list(range(6))
    assert s.anchors.all()
    assert s.refused[3] == -1
    assert collate([s], 3).mask.sum(1).tolist() == [3, 3, 3, 3, 2, 1]


def test_segments_know_the_prior_that_was_drafted_with(tmp_path: Path) -> None:
    log = Log(tmp_path / "ring")
    weights = np.array([0.5, 0.25, 1.0, 0.0, 1.5])
    log.add(log.step(2))
    log.add(msgspec.structs.replace(log.step(1), prior=pack_weights(weights)))
    log.add(msgspec.structs.replace(log.step(1), prior=pack_weights(weights[:3])))  # of another engine
    log.add(msgspec.structs.replace(log.step(1), prior=pack_weights(weights * np.nan)))
    [(_, s)] = log.assembler.flush()
    assert s.prior.tolist() == [[0.0] * NUM_FEATURES] * 3 + [weights.tolist()] * 2
    assert log.assembler.num_unusable == 2


def test_what_does_not_teach_is_context_only(tmp_path: Path) -> None:
    log = Log(tmp_path / "ring")
    log.add(log.step(2), is_teaching=False)
    log.add(log.step(2))
    [(key, s)] = log.assembler.flush()
    assert key == "key"
    assert s.anchors.tolist() == [False] * 3 + [True] * 3


def test_chains_stop_at_gaps_and_at_unknown_targets() -> None:
    one = segment("a", 5)
    gap = torch.tensor([0, 1, 2, 7, 8])
    logits = torch.zeros(5, K, dtype=torch.float16)
    logits[4] = -torch.inf
    batch = collate([dataclasses.replace(one, positions=gap, top_logits=logits, anchors=one.anchors & (gap < 8))], 4)
    assert batch.mask.sum(1).tolist() == [3, 2, 1, 1]
    assert batch.starts.tolist() == [0, 1, 2, 3]


def test_damaged_targets_do_not_damage_the_gradient() -> None:
    """A row of no numbers within a chain, one of infinities, and steps behind the segment's end."""
    logits = torch.zeros(5, K, dtype=torch.float16)
    logits[2], logits[4] = torch.nan, torch.inf
    one = segment("a", 5)
    batch = collate([dataclasses.replace(one, top_logits=logits, anchors=torch.arange(5) < 2)], 6)
    draft = torch.randn(*batch.mask.shape, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chains = torch.arange(len(batch.starts))
    steps = [
        ChainStep(number, chains, draft[:, number], batch.top_ids[:, number], batch.top_logits[:, number], mask)
        for number, mask in enumerate(batch.mask.unbind(1))
    ]
    for temperature in (0.5, 1.0, 2.0):
        (gradient,) = torch.autograd.grad(divergence(steps, temperature), draft)
        assert gradient.isfinite().all()
        assert gradient[batch.mask].any(-1).all()
