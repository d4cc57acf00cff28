"""A whole draft, grown from the traffic of a model that has none: as ``adapters.training`` trains one offline.

It starts from the target's own last layer. Each position of a segment is learned from, those of prompts included: the
label is what the target's last layer gave there, which the engine logs behind the features.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from evospec.adapters.alignment.chains import ChainDrafter, padded
from evospec.adapters.alignment.records import Segment
from evospec.adapters.alignment.updates import Update, Updater
from evospec.adapters.target_parts import fastest_dtype, load_target_parts
from evospec.adapters.training.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint
from evospec.adapters.training.dataset import Batch
from evospec.adapters.training.first_weights import fit_to_features, init_from_target
from evospec.adapters.training.learner import Learner, most_frequent
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.weights import open_weights
from evospec.engine.online.whole_draft import growing_config, whole_layout

log = structlog.get_logger(__name__)

_MEAN_SHARE, _MEAN_START = 0.02, 4
"""What an update adds to the running mean that is published; a greater share among the first ones."""
_PAUSE = 20
"""Times what a checkpoint has taken, until the next one."""


class DraftGrower(Updater):
    """Trains all weights of a draft, by one step each at first, then by several.

    What is published is a running mean of the weights. Optimiser and weights are made with the first update: before
    there is traffic they take no memory.
    """

    trains_fusion = True
    grows = True

    def __init__(self, base: ChainDrafter, config: AdaptersConfig, key: str, fingerprint: str) -> None:
        self._directory: Path | None = None
        self._learner: Learner | None = None
        self._resumes = False
        super().__init__(base, config, key, fingerprint)
        self.layout = whole_layout(base.draft.config, fingerprint)
        self._token_counts = torch.zeros(len(base.target.head), dtype=torch.int64)

    def load(self, published: Mapping[str, torch.Tensor] | None, is_own: bool = False) -> None:
        """Go on from these weights, None: the target's last layer; what is in training is dropped, with its checkpoint.

        They are unrolled over as many steps as what is dropped: with one, they would unlearn the others. ``is_own``: of
        the same server, whose earlier process may have left a checkpoint to go on from.
        """
        self._resumes &= is_own and self._learner is None
        if not self._resumes and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._published, self._learner = published, None
        if published is None:
            self._progress = TrainingProgress()
        elif not self._progress.anchors:  # somebody else's, who has unrolled them
            self._progress.anchors = self._config.growth.one_step_positions
        self._weights = dict(published or self._base.draft.state_dict())  # what is published next

    def resume(self, directory: Path) -> None:
        """Go on from the checkpoint there, if there is one; and keep one there from now on."""
        self._directory, self._resumes = directory, True

    def update(self, segments: Sequence[Segment]) -> Update:
        """One step of the optimiser on all positions of some segments, at least one."""
        started = time.process_time()
        growth, training = self._config.growth, self._config.training
        batch = training_batch(segments, training.horizon, self._base.draft.config.fused_size)
        if not len(batch.starts):  # single tokens: nobody knows what the target says after them
            return Update(0.0, 0, time.process_time() - started)
        learner = self._learner or self._begin(batch)
        self._token_counts += torch.bincount(batch.token_ids.flatten(), minlength=len(self._token_counts))
        num_steps = 1 if self._progress.anchors < growth.one_step_positions else training.horizon
        core = most_frequent(self._token_counts)
        losses = learner.step(batch, core, num_steps, training.learning_rate, self._num_updates)
        self._progress.step += 1
        self._progress.anchors += len(batch.starts)
        self._num_updates += 1
        share = max(_MEAN_SHARE, _MEAN_START / (_MEAN_START + self._num_updates))
        for name, weight in learner.draft.state_dict().items():
            self._weights[name].lerp_(weight, share)
        if time.monotonic() >= self._save_at:
            self._save(learner)
        return Update(losses[0], len(batch.starts), time.process_time() - started)

    def published(self) -> dict[str, torch.Tensor]:
        return {name: weight.bfloat16() for name, weight in self._weights.items()}

    def drafter(self, published: Mapping[str, torch.Tensor]) -> ChainDrafter:
        draft = copy.deepcopy(self._base.draft)
        draft.load_state_dict(published)
        return replace(self._base, draft=draft)

    def _begin(self, batch: Batch) -> Learner:
        """What is to be trained: what the checkpoint has, what was published, or the target's last layer."""
        draft = Eagle3(self._base.draft.config)
        draft.load_state_dict(self._weights)
        if self._published is None:
            fit_to_features(draft, batch.features_of_starts())
        learner = Learner(draft, self._base.target)
        self._progress, self._num_updates = self._restored(learner) or self._progress, 0
        self._save_at = time.monotonic() + self._config.growth.checkpoint_seconds
        log.info("a draft grows", key=self._key, updates=self._progress.step, positions=self._progress.anchors)
        self._learner, self._weights = learner, {name: weight.clone() for name, weight in draft.state_dict().items()}
        return learner

    def _restored(self, learner: Learner) -> TrainingProgress | None:
        if self._resumes and self._directory is not None:
            try:
                return load_checkpoint(self._directory, learner.draft, learner.optimizer)
            except (ModelError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("the checkpoint cannot be read: the draft grows from the start", reason=str(error))
        return None

    def _save(self, learner: Learner) -> None:
        """Keep a checkpoint, if the disk has room: else the draft grows on, and the one before stays."""
        started = time.monotonic()
        if self._directory is not None:
            try:
                save_checkpoint(self._directory, learner.draft, learner.optimizer, self._progress)
            except (OSError, SafetensorError) as error:
                log.warning("no checkpoint can be written", key=self._key, reason=str(error))
        now = time.monotonic()
        self._save_at = now + max(self._config.growth.checkpoint_seconds, _PAUSE * (now - started))


def training_batch(segments: Sequence[Segment], num_steps: int, fused_size: int) -> Batch:
    """A chain from each position of some segments whose label is known: the row of the next position has it.

    Args:
        segments: whose rows have the features of the position before, and behind them its last layer's output.
        num_steps: most steps of a chain.
        fused_size: width of the features.
    """
    rows = padded([segment.inputs for segment in segments], 0)
    positions = padded([segment.positions for segment in segments], 0, -1)
    is_known = F.pad(positions[:, 1:] == positions[:, :-1] + 1, (0, num_steps))
    length = positions.shape[1]
    lengths, goes_on = torch.zeros_like(positions), torch.ones_like(positions, dtype=torch.bool)
    for step in range(num_steps):
        goes_on = goes_on & is_known[:, step : step + length]
        lengths += goes_on
    return Batch(
        token_ids=padded([segment.token_ids for segment in segments], num_steps),
        positions=positions.clamp(min=0),
        starts=(lengths > 0).flatten().nonzero().flatten(),
        features=rows[..., :fused_size],
        labels=F.pad(rows[:, 1:, fused_size:], (0, 0, 0, 1 + num_steps)),
        lengths=lengths[lengths > 0],
    )


def seed_of_draft(files: ModelFiles, spec: ModelSpec, max_model_len: int | None) -> ChainDrafter:
    """The draft that grows for a model, before it has learned anything.

    Raises:
        ModelError: a tensor is missing or damaged.
    """
    source = open_weights(files)
    torch.manual_seed(0)
    draft = Eagle3(growing_config(spec, files.name))
    init_from_target(draft, source.dequantized, spec)
    target = load_target_parts(files, spec, max_model_len, fastest_dtype())
    draft = draft.to(fastest_dtype()).requires_grad_(False)
    return ChainDrafter(draft, target)
