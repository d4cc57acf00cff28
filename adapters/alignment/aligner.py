"""One adapter key: what it has seen, what it has learned, and which of its versions is in force."""

from __future__ import annotations

import time

import structlog
import torch

from evospec.adapters.alignment.chains import ChainDrafter
from evospec.adapters.alignment.guard import Guard, Verdict, judge
from evospec.adapters.alignment.records import Segment
from evospec.adapters.alignment.replay import ReplayBuffer
from evospec.adapters.alignment.scoring import KnownScores, ScoreCache, Scoring
from evospec.adapters.alignment.shared_versions import Unshared
from evospec.adapters.alignment.store import AdapterStore
from evospec.adapters.alignment.trigger import UpdateTrigger
from evospec.adapters.alignment.updates import Updater
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.online.adapter_control import AdapterStatus, Stage
from evospec.engine.online.verify_record import VerifyRecord

log = structlog.get_logger(__name__)


class KeyAligner:
    """Takes a key's traffic, and decides what should be in force for it.

    The owner publishes ``tensors`` whenever ``is_unpublished``, and tells by ``published``; it calls ``save`` whenever
    ``is_unsaved``. A new aligner goes on from the last good revision on disk.

    Args:
        key: names the adapter.
        base: the base draft.
        updater: owns the weights of this key alone.
        store: has the versions of all keys.
        config: everything else.
    """

    def __init__(
        self, key: str, base: ChainDrafter, updater: Updater, store: AdapterStore, config: AdaptersConfig
    ) -> None:
        self._base, self._updater, self._store, self._config = base, updater, store, config
        self.state = store.load_state(key)
        self.replay = ReplayBuffer(config.replay)
        self._new_watch()
        self.revision = 0  # the revision in force, or to be; 0: the base draft
        self.tensors: dict[str, torch.Tensor] | None = None  # its weights as they are published
        self.is_unpublished = True  # whether they are not in force: they never were, or the engine has lost them
        self.is_unsaved = False  # whether the state on disk is an older one
        self._is_new = True  # whether they never were
        self._is_own = True  # whether this server has learned them
        self.leads = True  # whether this server learns the key, and no other
        self.machine_is_idle = False
        self.joined_after = self.state.learns_after  # what was joined to segments was logged after it
        self.unshared = set[Unshared]()  # what other servers have not been told yet
        self.shared_number = 0  # of the servers' last version that was looked at here
        self.channel_version = 0
        self.worked_at = 0.0  # when it worked last, by the monotonic clock
        self._num_unjudged = 0  # updates since weights were scored
        self._num_ahead = 0  # updates since those in force
        self._num_more = 0  # updates on older positions that batches of new ones have brought and that are still to do
        self._scoring: Scoring | None = None  # a scoring of the updater's weights, which stay as they are meanwhile
        self._scores = ScoreCache()
        self._last_loss: float | None = None
        self._last_agreement: float | None = None
        self._last_refusal = ""
        self._num_records = self._num_teaching = self._num_steps = self._num_synthetic = 0
        self._go_to(self.state.good_revision)
        self._updater.resume(store.checkpoint_directory(key))

    def count(self, record: VerifyRecord, teaches: bool) -> None:
        """Count a record, and take the version in force back if it turns out to be bad.

        What is not published yet is not blamed for what the one before it did. By a synthetic record no version is
        judged; what it takes to learn from it is worth as much as if it were traffic.
        """
        self._num_steps += 1
        self._num_synthetic += record.is_synthetic
        if record.is_synthetic:
            return
        self._num_records += 1
        self._num_teaching += teaches
        if self._guard.is_bad_after(record) and self.revision and not self._is_new:
            log.warning("adapter taken back", key=self.state.key, revision=self.revision, **self._guard.rates())
            if "version" not in self.unshared:
                self.state.bad_number = self.shared_number
            if self._is_own:
                self.unshared.add("version")
            self.replay.clear()  # it made a bad version
            self.roll_back()

    def add(self, segment: Segment) -> None:
        """Take in what may be learned from; a frozen key will not learn from what came meanwhile, later either."""
        if not self.state.is_frozen:
            self.replay.add(segment)

    def tick(self) -> None:
        """What there is to do about once a second."""
        self._trigger.add_steps(self._num_steps)
        self._num_steps = 0
        if self._guard.is_good and not self._is_new and self.state.good_revision != self.revision:
            self.state.good_revision = self.revision
            self.save()
        self._trigger.compare_acceptance(self._guard.in_force)

    @property
    def wants_work(self) -> bool:
        """Whether ``work`` has something worthwhile to do."""
        if self.state.is_frozen:
            return False
        wants_more = self._num_more > 0 and self.replay.has_older and (self.machine_is_idle or self._trigger.pays)
        return self._scoring is not None or self._may_judge or wants_more or self._wants_update

    @property
    def wants_answers(self) -> bool:
        """Whether it would learn from answers that nobody has asked for."""
        asks = self._updater.grows and self._config.synthetic_answers and not self.state.is_frozen
        return asks and self._trigger.pays

    def work(self) -> None:
        """One update, or a part of the scoring of what the last ones gave."""
        self.worked_at = time.monotonic()
        if self._scoring is None and self._may_judge:
            self._begin_scoring()
        if self._scoring is None:
            self._update()
            return
        self._scoring.go_on()
        if self._scoring.is_done:
            scoring, self._scoring = self._scoring, None
            # Void where somebody has met the version in force meanwhile, of which too little is known then.
            if self._guard.may_be_followed:
                self._judge(scoring)

    def published(self, version: int) -> None:
        """``tensors`` are in force as ``version`` of the channel, 0: no slot is needed."""
        if self._is_new:
            self._guard.watch(version)
        else:
            self._guard.version = version
        self.is_unpublished = self._is_new = False
        self.channel_version = version

    def roll_back(self) -> None:
        """Return to the good revision before the one in force, or to the base draft."""
        if self.revision == 0:
            return
        bad = self.revision
        if bad == self.state.good_revision:
            self.state.good_revision = 0
        self.state.num_rolled_back += 1
        self._go_to(self.state.good_revision)
        try:
            self._store.quarantine(self.state.key, bad)
            self.save()
        except OSError as error:  # what is bad goes, full disk or not
            self.is_unsaved = True
            log.warning("a bad adapter cannot be kept aside", key=self.state.key, revision=bad, reason=str(error))

    def follow(self, tensors: dict[str, torch.Tensor] | None, is_own: bool) -> None:
        """Put in force what the servers have, None: the base draft, and learn on from it; ``is_own``: learned here."""
        log.info("adapter shared by servers", key=self.state.key, is_base=tensors is None, is_own=is_own)
        if tensors is not None:
            self._put_in_force(tensors)
        self._go_to(0 if tensors is None else self.revision, is_own)
        self._is_own = is_own

    def forget(self, now: float) -> None:
        """Drop all that was learned of the key, and learn from what is logged from ``now`` on."""
        self.state = self._store.forget(self.state)
        self.state.learns_after = now
        self.unshared.clear()
        self.replay.clear()
        self._scores = ScoreCache()
        self._new_watch()
        self._go_to(0)

    def save(self) -> None:
        """Keep the state; it stays unsaved where the disk is full, which is an error."""
        self.is_unsaved = True
        self._store.save_state(self.state)
        self.is_unsaved = False

    def status(self, slot: int | None) -> AdapterStatus:
        state, guard = self.state, self._guard
        stage: Stage = ("serving" if self.revision else "growing") if self._updater.grows else "adapting"
        return AdapterStatus(
            stage=stage,
            revision=self.revision,
            good_revision=state.good_revision,
            slot=slot,
            channel_version=self.channel_version,
            is_frozen=state.is_frozen,
            num_records=self._num_records,
            num_synthetic_records=self._num_synthetic,
            num_trained_positions=state.num_trained_positions,
            num_updates=state.num_updates,
            num_published=state.num_published,
            num_refused=state.num_refused,
            num_rolled_back=state.num_rolled_back,
            gate_rate=self._num_teaching / max(1, self._num_records),
            loss=self._last_loss,
            agreement=self._last_agreement,
            update_seconds=self._trigger.seconds,
            acceptance=guard.acceptance.rate,
            control_acceptance=guard.control.rate,
            previous_acceptance=guard.previous.rate,
            last_refusal=self._last_refusal,
        )

    @property
    def _may_judge(self) -> bool:
        """Whether weights are due for scoring, and enough is known to score them and to let them follow."""
        return (
            self._num_unjudged >= self._config.training.updates_per_version
            and not self._is_new
            and self._guard.may_be_followed
            and self.replay.num_held_out_positions >= self._config.guard.min_held_out
        )

    @property
    def _wants_update(self) -> bool:
        """Whether new positions are to be learned from now."""
        num_new, num_arrived = self.replay.num_new_positions, self.replay.num_arrived_positions
        return self._trigger.wants_update(num_new, num_arrived, self.machine_is_idle)

    def _update(self) -> None:
        training = self._config.training
        if self._wants_update:
            segments = self.replay.take(training.batch_positions, training.history_share)
            # Traffic that comes faster than it is learned from is made up for when there is less of it.
            more_each = training.updates_per_batch - 1
            self._num_more = min(self._num_more + more_each, more_each * self.replay.num_segments)
        else:
            segments = self.replay.take_older(training.batch_positions)
            self._num_more -= 1
        update = self._updater.update(segments)
        self._num_unjudged += 1
        self._num_ahead += 1
        self.state.num_updates += 1
        self.state.num_trained_positions += update.num_positions
        self._last_loss = update.loss
        self._trigger.add_update(update.seconds)

    def _begin_scoring(self) -> None:
        """Compare what was trained with the base draft and what is in force, on held-out positions."""
        segments, scores = list(self.replay.held_out), self._scores
        scores.choose_tokens(segments, len(self._base.target.head))
        scores.candidate = KnownScores()
        drafters = [(self._updater.drafter(self._updater.published()), scores.candidate), (self._base, scores.base)]
        if self.tensors is not None:
            drafters.append((self._updater.drafter(self.tensors), scores.current))
        self._scoring = Scoring(segments, drafters, scores.tokens, self._config.training.horizon)

    def _judge(self, scoring: Scoring) -> None:
        """Put what was trained in force, or go back to what is."""
        scores = [score.by_acceptance() if self._updater.grows else score for score in scoring.scores()]
        new, base, current = scores[0], scores[1], scores[-1]
        self._last_agreement = new.agreement
        self._trigger.add_score(current.loss - new.loss, self._num_ahead, scoring.seconds / self._num_unjudged)
        verdict, reason = judge(new, current, base, self._config.guard)
        log.info("adapter scored", key=self.state.key, verdict=verdict.value, reason=reason)
        if verdict is Verdict.PUBLISH:
            self._put_in_force(self._updater.published())
            self.state.num_published += 1
            self._is_own = True
            self.unshared.add("version")
            self._scores.current = self._scores.candidate
        elif verdict is Verdict.REFUSE:
            self.state.num_refused += 1
            self._last_refusal = reason
            self._updater.load(self.tensors)
        if verdict is not Verdict.TRAIN_ON:
            self._num_ahead = 0
        self._num_unjudged = 0
        self.save()

    def _put_in_force(self, candidate: dict[str, torch.Tensor]) -> None:
        if self.revision == 0 or self._guard.num_watched:  # nothing was wrong with it as long as it was watched
            self.state.good_revision = self.revision
        self.revision = self._store.save(self.state, candidate)
        self.tensors = candidate
        self.is_unpublished = self._is_new = True
        self.save()  # first, or a worker killed here would look for what is deleted below
        self._store.keep_only(self.state.key, {self.state.good_revision, self.revision})

    def _go_to(self, revision: int, is_own: bool = False) -> None:
        """Put an earlier revision in force and learn on from it. ``is_own``: from what was not published, too."""
        self.tensors = self._store.load(self.state.key, revision) if revision else None
        self.revision = revision if self.tensors is not None else 0
        self._scoring = None  # of weights that came from others than these
        self._scores.current.clear()
        self._updater.load(self.tensors, is_own)
        self._num_unjudged = self._num_ahead = self._num_more = 0
        self.is_unpublished = self._is_new = True

    def _new_watch(self) -> None:
        self._guard = Guard(self._config.guard)
        self._trigger = UpdateTrigger(self._config.pace, self._config.training.batch_positions)
