"""What a key's aligner decides while the engine still drafts with what was in force before, and when it learns."""

from __future__ import annotations

import copy
import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evospec.adapters.alignment import aligner as aligner_module
from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.chains import collate
from evospec.adapters.alignment.exchange import obey
from evospec.adapters.alignment.guard import Verdict
from evospec.adapters.alignment.records import Segment
from evospec.adapters.alignment.scoring import KnownScores, Score, Scoring
from evospec.adapters.alignment.store import AdapterStore
from evospec.adapters.alignment.trigger import UpdateTrigger
from evospec.adapters.alignment.updates import Update, Updater
from evospec.engine.adapters_config import AdaptersConfig, GuardConfig, ReplayConfig, TrainingConfig
from evospec.engine.online.adapter_control import AdapterCommand
from tests.drifting_traffic import DriftingTraffic, TinyDraft
from tests.unit.test_guard import sampled
from tests.unit.test_replay import segment

REQUESTS = 8
NEVER = 1_000_000
EAGER = AdaptersConfig(
    rank=4,
    training=TrainingConfig(updates_per_version=1, batch_positions=64),
    guard=GuardConfig(min_held_out=1, min_watched=32, watched_records=256),
    replay=ReplayConfig(held_out_share=0.5),
)
PATIENT = AdaptersConfig(
    rank=4,
    training=TrainingConfig(updates_per_version=NEVER, batch_positions=64),
    replay=ReplayConfig(held_out_share=1e-9),
)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> TinyDraft:
    return TinyDraft.make(tmp_path_factory.mktemp("aligner"))


class Key:
    """An aligner, its store and its traffic."""

    def __init__(self, draft: TinyDraft, directory: Path, config: AdaptersConfig) -> None:
        self.updater = Updater(draft.drafter, config, "key", draft.base)
        self.store = AdapterStore(directory, self.updater.layout)
        self.aligner = KeyAligner("key", draft.drafter, self.updater, self.store, config)
        self.answers = DriftingTraffic(draft.drafter).answers(8)
        self.aligner.published(0)

    def count(self, version: int, is_right: bool, count: int) -> None:
        for number in range(count):
            self.aligner.count(sampled(version, is_right, f"{version}-{number % REQUESTS}"), True)

    def serve_segments(self, count: int, num_positions: int) -> None:
        """Take in answers of so many positions, and do after each what there is to do."""
        for number in range(count):
            self.aligner.add(segment(str(number), num_positions))
            while self.aligner.wants_work:
                self.aligner.work()

    def decide(self) -> None:
        """Learn from new answers, and put in force what comes of it."""
        before = self.aligner.revision
        for number, answer in enumerate(self.answers):
            self.aligner.add(answer.segment(f"{number}"))
        for _ in range(16):  # an update, and scoring in parts
            if self.aligner.revision == before:
                assert self.aligner.wants_work
                self.aligner.work()
        assert self.aligner.revision > before
        assert self.aligner.is_unpublished


@pytest.fixture
def key(draft: TinyDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Key:
    """Of an aligner that publishes all that it scores."""
    monkeypatch.setattr(aligner_module, "judge", lambda *_: (Verdict.PUBLISH, "a test"))
    monkeypatch.setattr(UpdateTrigger, "pays", True)
    return Key(draft, tmp_path, EAGER)


def test_revision_is_not_good_before_it_was_published(key: Key) -> None:
    key.decide()
    key.aligner.tick()
    assert key.aligner.state.good_revision == 0
    key.aligner.published(1)
    key.aligner.tick()
    assert key.aligner.state.good_revision == 0
    key.count(1, True, 256)
    key.aligner.tick()
    assert key.aligner.state.good_revision == 1


def test_revision_is_not_blamed_for_the_one_before_it(key: Key) -> None:
    """Nor followed before anything is known of it."""
    key.count(0, True, 256)
    key.decide()
    key.aligner.published(1)
    key.count(1, True, 32)
    key.decide()
    key.count(1, False, 256)
    key.aligner.add(key.answers[0].segment("0"))
    assert not key.aligner._may_judge
    assert (key.aligner.revision, key.aligner.state.num_rolled_back) == (2, 0)
    assert key.store.load("key", 2) is not None


def test_a_revision_that_nobody_has_met_may_be_followed(key: Key) -> None:
    """But is none to return to; the next one is compared with what was met."""
    key.decide()
    key.aligner.published(1)
    key.count(1, True, 64)
    key.decide()
    met, acceptance = key.aligner.state.good_revision, key.aligner._guard.in_force
    key.aligner.published(2)
    key.decide()
    assert (key.aligner.revision, key.aligner.state.good_revision) == (met + 2, met)
    key.aligner.published(3)
    assert key.aligner._guard.previous == acceptance
    key.count(3, True, 1)
    for number, answer in enumerate(key.answers):
        key.aligner.add(answer.segment(f"{number}"))
    while key.aligner.wants_work and key.aligner._num_unjudged < 8:
        key.aligner.work()
    assert key.aligner.revision == met + 2, "somebody has met it"


def test_a_score_is_void_where_somebody_met_the_revision_meanwhile(key: Key) -> None:
    """Too little is known of it then: neither is it good, nor may another follow."""
    key.decide()
    key.aligner.published(1)
    for number, answer in enumerate(5 * key.answers):
        key.aligner.add(answer.segment(f"{number}"))
    while key.aligner._scoring is None:
        key.aligner.work()
    key.count(1, True, 5)
    while key.aligner._scoring is not None:
        key.aligner.work()
    assert (key.aligner.revision, key.aligner.state.good_revision) == (1, 0)
    key.count(1, True, 64)
    while key.aligner.revision == 1:
        assert key.aligner.wants_work
        key.aligner.work()
    assert key.aligner.state.good_revision == 1


def test_bad_revision_is_taken_back_once(key: Key) -> None:
    """Its records that are still on their way do not take the good one back as well."""
    key.count(0, True, 256)
    key.decide()
    key.aligner.published(1)
    key.count(1, True, 256)
    key.decide()
    key.aligner.published(2)
    key.count(2, False, 256)
    assert (key.aligner.revision, key.aligner.state.good_revision, key.aligner.state.num_rolled_back) == (1, 1, 1)
    assert key.store.load("key", 1) is not None
    assert key.store.load("key", 2) is None


def put_a_good_one_in_force(key: Key) -> None:
    """The first revision, after the base draft."""
    key.count(0, True, 256)
    key.decide()
    key.aligner.published(1)
    key.count(1, True, 256)
    key.aligner.tick()
    assert key.aligner.state.good_revision == 1


def test_a_good_revision_that_turns_out_to_be_bad_is_good_no_more(key: Key) -> None:
    """The one before it is gone: there is none to return to."""
    put_a_good_one_in_force(key)
    key.count(1, False, 256)
    assert (key.aligner.revision, key.aligner.state.good_revision, key.aligner.is_unsaved) == (0, 0, False)
    assert key.store.load_state("key").good_revision == 0


@pytest.mark.parametrize("fails", ["quarantine", "save_state"])
def test_bad_revision_is_in_force_no_more_where_the_disk_is_full(
    key: Key, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Nothing can be made there, the directory of the quarantine included. It may have been good before."""
    put_a_good_one_in_force(key)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(AdapterStore, fails, fail)
        key.count(1, False, 256)
    aligner = key.aligner
    assert (aligner.revision, aligner.tensors, aligner.is_unpublished, aligner.is_unsaved) == (0, None, True, True)
    aligner.save()
    assert not aligner.is_unsaved
    kept = key.store.load_state("key")
    assert (kept.good_revision, kept.num_rolled_back) == (0, 1)


def test_an_operators_rollback_is_for_all_servers_where_the_disk_is_full(
    key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    key.decide()
    key.aligner.unshared.clear()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AdapterStore, "save_state", fail)
    obey(key.aligner, AdapterCommand("rollback", "key"), 0.0)
    assert (key.aligner.tensors, key.aligner.unshared, key.aligner.is_unsaved) == (None, {"version"}, True)


def test_worker_killed_while_it_publishes_finds_a_good_revision(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2):
        key.decide()
        key.aligner.published(version)
        key.count(version, True, 256)
    key.aligner.tick()
    assert key.store.load_state("key").good_revision == 2

    def keep_only_and_die(store: AdapterStore, key: str, revisions: set[int]) -> None:
        keep_only(store, key, revisions)
        raise KeyboardInterrupt

    keep_only = AdapterStore.keep_only
    monkeypatch.setattr(AdapterStore, "keep_only", keep_only_and_die)
    with pytest.raises(KeyboardInterrupt):
        key.decide()
    state = key.store.load_state("key")
    assert (state.good_revision, state.last_revision) == (2, 3)


def test_key_that_learns_nothing_is_tried_now_and_then_however_little_is_kept(
    draft: TinyDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """44,000 positions, of which the replay keeps 1,760 that are new."""
    key = Key(draft, tmp_path, PATIENT)
    monkeypatch.setattr(UpdateTrigger, "pays", False)
    monkeypatch.setattr(key.updater, "update", lambda _: Update(loss=1.0, num_positions=110, seconds=1.0))
    key.aligner._trigger._patience = 8
    key.serve_segments(400, 110)
    assert 60 <= key.aligner.state.num_updates <= 100


def test_scoring_leaves_room_for_what_else_there_is_to_do(key: Key) -> None:
    """A few segments at a time; where the key was reset meanwhile, nothing comes of it."""
    for number, answer in enumerate(5 * key.answers):
        key.aligner.add(answer.segment(f"{number}"))
    num_held_out = len(key.aligner.replay.held_out)
    assert num_held_out > 8

    def parts() -> int:
        count = 0
        while key.aligner.revision == 0:
            key.aligner.work()
            count += 1
        return count

    key.aligner.work()
    assert parts() == -(-num_held_out // 4)
    key.aligner.published(1)
    key.count(1, True, 32)
    key.aligner.work()
    key.aligner.work()
    key.aligner.roll_back()
    key.aligner.published(0)
    assert key.aligner.revision == 0
    key.aligner.work()
    assert key.aligner.revision == 0
    assert parts() == -(-num_held_out // 4)


def test_key_whose_answers_are_very_short_learns_too(
    draft: TinyDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three positions each: those that are kept and new are never as many as an update wants."""
    key = Key(draft, tmp_path, PATIENT)
    monkeypatch.setattr(UpdateTrigger, "pays", True)
    monkeypatch.setattr(key.updater, "update", lambda _: Update(loss=1.0, num_positions=48, seconds=1.0))
    key.serve_segments(400, 3)
    assert key.aligner.state.num_updates >= 16


def test_change_of_traffic_wakes_a_key_that_has_the_base_draft(draft: TinyDraft, tmp_path: Path) -> None:
    key = Key(draft, tmp_path, PATIENT)

    def serve(tenths: int) -> None:
        for number in range(50):
            for step in range(10):
                key.aligner.count(sampled(0, step < tenths, str(number)), True)

    serve(6)
    key.aligner.tick()
    key.aligner._trigger.add_update(2.0)
    for _ in range(20):
        key.aligner._trigger.add_score(0.0, 8)
    key.aligner.tick()
    assert key.aligner._trigger._patience == 8
    serve(4)
    key.aligner.tick()
    assert key.aligner._trigger._patience == 1


def test_an_idle_machine_learns_from_all_that_comes(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the last updates have brought, and as often from older positions; then there is nothing more to do."""
    monkeypatch.setattr(UpdateTrigger, "pays", False)
    key.aligner._trigger._patience = 8
    for number, answer in enumerate(key.answers):
        key.aligner.add(answer.segment(f"{number}"))
    key.aligner.machine_is_idle = True
    assert key.aligner.wants_work
    for _ in range(200):
        if key.aligner.wants_work:
            key.aligner.work()
    assert not key.aligner.wants_work
    assert key.aligner.replay.num_new_positions < EAGER.training.batch_positions
    assert key.aligner.state.num_updates > 1


def test_what_comes_while_a_key_is_frozen_is_not_learned_later(key: Key) -> None:
    obey(key.aligner, AdapterCommand("freeze", "key"), 0.0)
    assert key.aligner.is_unsaved
    for number, answer in enumerate(key.answers):
        key.aligner.add(answer.segment(f"{number}"))
    assert not key.aligner.wants_work
    obey(key.aligner, AdapterCommand("unfreeze", "key"), 0.0)
    assert not key.aligner.wants_work
    key.decide()


def test_agreement_is_what_a_verification_would_accept(draft: TinyDraft) -> None:
    """Counted from all steps of all chains; one segment is in the middle of its request, of which there are two."""
    segments = [
        answer.segment(name) for answer, name in zip(DriftingTraffic(draft.drafter).answers(3), "aab", strict=True)
    ]
    tokens = torch.arange(len(draft.drafter.target.head))
    scoring = Scoring(segments, [(draft.drafter, KnownScores())], tokens, horizon=3)
    scoring.go_on()
    [score] = scoring.scores()
    expected, first_losses = [], []
    for each in segments:
        batch = collate([each], 3)
        with torch.no_grad():
            steps = draft.drafter.steps(batch, tokens)
        for chain in range(len(batch.starts)):
            named = [int(step.logits[chain].argmax()) for step in steps]
            wanted = batch.top_ids[chain, :, 0].tolist()
            is_right = [a == b and m for a, b, m in zip(named, wanted, batch.mask[chain].tolist(), strict=True)]
            expected.append(next((number for number, right in enumerate(is_right) if not right), 3))
            target = batch.top_logits[chain, 0].log_softmax(-1)
            logs = steps[0].logits[chain].log_softmax(-1)[batch.top_ids[chain, 0]]
            first_losses.append(float((target.exp() * (target - logs)).sum()))
    assert 0 < sum(expected) < 3 * len(expected)
    assert score.accepted.tolist() == expected
    assert score.agreement == pytest.approx(sum(expected) / len(expected))
    assert score.loss == pytest.approx(sum(first_losses) / len(first_losses), rel=1e-4)
    assert score.requests.tolist() == [0] * 2 * 48 + [1] * 48


def test_what_is_known_of_segments_is_not_scored_again(draft: TinyDraft) -> None:
    """Scores are the same as without."""
    answers = DriftingTraffic(draft.drafter).answers(44)
    segments = [answer.segment(f"{number}") for number, answer in enumerate(answers)]
    other = copy.deepcopy(draft.drafter.draft)
    other.down_proj.weight.zero_()
    drafter = replace(draft.drafter, draft=other)

    def scored(of: list[Segment], known: KnownScores) -> Score:
        scoring = Scoring(of, [(drafter, known)], tokens, horizon=3)
        while not scoring.is_done:
            scoring.go_on()
        return scoring.scores()[0]

    tokens = torch.arange(0, 500, 3)
    known = KnownScores()
    scored(segments[:40], known)
    with_known, fresh = scored(segments[4:], known), scored(segments[4:], KnownScores())
    assert (with_known.agreement, with_known.loss) == (fresh.agreement, fresh.loss)
    assert torch.equal(with_known.accepted, fresh.accepted)
    scoring = Scoring(segments, [(drafter, known)], tokens, horizon=3)
    scoring.go_on()
    assert scoring.is_done
    del segments, scoring, answers
    assert not known
