"""Trains an EAGLE-3 draft offline, on what ``adapters.training.generate`` has written: ``evospec train-draft MODEL``.

A cheap one-step phase first, then a phase of several unrolled steps (training-time test). The target's own
distribution is the label, over some thousand rows of its head: frequent tokens, those of the batch, random ones.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import structlog
import torch
import typer

from evospec.adapters.target_parts import fastest_dtype, target_parts
from evospec.adapters.training.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint
from evospec.adapters.training.conversations import data_directory, shard_paths, text_directory
from evospec.adapters.training.dataset import Batch, Dataset
from evospec.adapters.training.first_weights import fit_to_features, init_from_target
from evospec.adapters.training.learner import Learner, most_frequent
from evospec.engine.config import ModelConfig
from evospec.engine.machine import available_cores
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.eagle3 import Eagle3, load_draft, save_draft
from evospec.engine.models.eagle3_config import Eagle3Config, recorded_layers
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.speculation.draft_files import DRAFTS

log = structlog.get_logger(__name__)

VALIDATION_STEPS = 4
_VALIDATION_TOKENS = 12_000
_VALIDATION_SECONDS = 240.0
"""From one to the next at least, and ten times what the last one took: over a large head that is minutes."""
_MAX_POSITIONS = 4096
_FINAL_SHARE = 0.02
"""The learning rate at the end of the run, as a share of its last phase's."""


@dataclass(frozen=True)
class Phase:
    """Part of a run: ``anchors`` positions with so many unrolled steps."""

    anchors: int
    num_steps: int
    learning_rate: float
    batch_tokens: int


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result, the data aside."""

    capture_layers: tuple[int, ...]
    intermediate_size: int
    phases: tuple[Phase, ...]
    start_from: Path | None = None
    """Directory of a draft of the same shape to go on from, with or without norms of features; None: the target's
    last layer."""
    seed: int = 0


class Trainer:
    """One run, from its last checkpoint on.

    Args:
        config: what to train.
        spec: the target's shape.
        files: the target's.
        data: directory of shards of answers.
        text: directory of shards of what others wrote and the target read; empty where there are none.
        checkpoints: directory of this run.
        output: where the draft goes, anew with every validation.

    Raises:
        ModelError: there are no conversations, or ``config.start_from`` is no draft, or one of another shape.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: ModelSpec,
        files: ModelFiles,
        data: Path,
        text: Path,
        checkpoints: Path,
        output: Path,
    ) -> None:
        torch.manual_seed(config.seed)
        self._config, self._spec, self._data, self._text = config, spec, data, text
        self._checkpoints, self._output = checkpoints, output
        self._width = (len(config.capture_layers) + 1) * spec.hidden_size
        self._dataset = self._read_dataset()
        source = open_weights(files)
        target = target_parts(source, spec, _MAX_POSITIONS, fastest_dtype())
        shape = Eagle3Config.for_target(spec, files.name, config.capture_layers, config.intermediate_size)
        self._validation = self._validation_batches()
        if not self._dataset.windows or not self._validation:
            raise ModelError(f"{data}: too few conversations; python -m evospec.adapters.training.generate makes them")
        if config.start_from is None:
            draft = Eagle3(shape)
            init_from_target(draft, source.dequantized, spec)
            fit_to_features(draft, torch.cat([batch.features_of_starts() for batch in self._validation]))
        else:
            draft = _loaded(config.start_from, shape)
        self._learner = Learner(draft, target)
        self.progress = load_checkpoint(checkpoints, draft, self._learner.optimizer) or TrainingProgress()

    def run(self) -> None:
        """Train to the end of the last phase."""
        begin = 0
        for phase in self._config.phases:
            while self.progress.anchors < begin + phase.anchors:
                self._epoch(phase, begin)
            begin += phase.anchors
        self._validate([])

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do but to write the draft."""
        return self.progress.anchors >= sum(phase.anchors for phase in self._config.phases)

    def _epoch(self, phase: Phase, begin: int) -> None:
        """One pass over the data that is there now, or the rest of the phase."""
        progress = self.progress
        self._dataset = self._read_dataset()
        counts = self._dataset.token_counts(self._spec.vocab_size)
        core = most_frequent(counts)
        # Another order after a restart in the middle of a pass, too.
        generator = np.random.default_rng((self._config.seed, progress.step))
        validated, pause = time.monotonic(), _VALIDATION_SECONDS
        for batch in self._dataset.batches(phase.batch_tokens, phase.num_steps, generator):
            started = time.monotonic()
            rate = self._learning_rate(phase, progress.anchors - begin)
            means = self._learner.step(batch, core, phase.num_steps, rate, progress.step)
            progress.step += 1
            progress.anchors += len(batch.starts)
            progress.seconds += time.monotonic() - started
            if (now := time.monotonic()) - validated > pause:
                self._validate(means)
                validated = time.monotonic()
                pause = max(_VALIDATION_SECONDS, 10 * (validated - now))
            if progress.anchors >= begin + phase.anchors:
                break

    def _learning_rate(self, phase: Phase, anchors: int) -> float:
        """After the warm-up. The last phase ends in a cosine. To fall before would be to climb again."""
        share = min(1.0, anchors / phase.anchors) if phase is self._config.phases[-1] else 0.0
        return phase.learning_rate * (_FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * share)) / 2)

    def _validate(self, means: Sequence[float]) -> None:
        accuracy = self._learner.accuracy(self._validation, VALIDATION_STEPS)
        found: dict[str, Any] = {
            "anchors": self.progress.anchors,
            "distinct": self._dataset.num_anchors,
            "seconds": round(self.progress.seconds),
            "loss": [round(mean, 4) for mean in means],
            "accuracy": [round(step, 4) for step in accuracy.steps],
            "acceptance_length": round(accuracy.acceptance_length, 4),
        }
        self.progress.history.append(found)
        save_checkpoint(self._checkpoints, self._learner.draft, self._learner.optimizer, self.progress)
        save_draft(self._learner.draft, self._output)
        log.info("validated", **found)

    def _read_dataset(self, validation: bool = False) -> Dataset:
        """The target's own answers, and for training what it has read as well."""
        shards = [*shard_paths(self._data), *(() if validation else shard_paths(self._text))]
        return Dataset(shards, self._width, self._spec.hidden_size, validation)

    def _validation_batches(self) -> list[Batch]:
        """A fixed sample of the held-out conversations."""
        dataset, batches, tokens = self._read_dataset(validation=True), list[Batch](), 0
        for batch in dataset.batches(2048, VALIDATION_STEPS, np.random.default_rng(0)):
            if tokens > _VALIDATION_TOKENS:
                break
            batches.append(batch)
            tokens += len(batch.starts)
        return batches


def _loaded(directory: Path, shape: Eagle3Config) -> Eagle3:
    draft = load_draft(directory, torch.float32, torch.device("cpu"))
    variant = replace(shape.variant, feature_norms=draft.config.variant.feature_norms)
    if draft.config != replace(shape, variant=variant):
        raise ModelError(f"{directory}: a draft of another shape than {shape}")
    return draft.requires_grad_()


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of the target.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the draft; default: drafts/<model>.")] = None,
    one_step: Annotated[int, typer.Option(help="Positions of the one-step phase.")] = 6_000_000,
    unrolled: Annotated[int, typer.Option(help="Positions of the unrolled phase.")] = 3_000_000,
    steps: Annotated[int, typer.Option(help="Unrolled steps.")] = 5,
    intermediate_size: Annotated[int, typer.Option(help="Width of the MLP; 0: the target's.")] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Directory of a draft to train further.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of the first phase, after a warm-up; at width 576.")] = 5e-4,
    unrolled_learning_rate: Annotated[float, typer.Option(help="Of the second phase, falling to its end.")] = 5e-4,
    batch_tokens: Annotated[int, typer.Option(help="Padded positions in a batch.")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one a core.")] = 0,
    run: Annotated[str, typer.Option(help="Name of the run: of its checkpoints.")] = "default",
) -> None:
    """Trains from the last checkpoint of the run on; every validation writes the draft."""
    torch.set_num_threads(threads or available_cores())
    files = resolve_model(ModelConfig(name=model))
    spec = validate_model_files(files)
    both = (
        Phase(one_step, 1, learning_rate, batch_tokens),
        Phase(unrolled, steps, unrolled_learning_rate, batch_tokens),
    )
    config = TrainConfig(
        capture_layers=recorded_layers(spec)[:-1],
        intermediate_size=intermediate_size or spec.intermediate_size,
        phases=tuple(phase for phase in both if phase.anchors),
        start_from=start_from,
        seed=seed,
    )
    data, text, output = data_directory(files.name), text_directory(files.name), output or DRAFTS / files.name
    trainer = Trainer(config, spec, files, data, text, data / "runs" / run, output)
    if start_from is not None and trainer.is_finished:
        raise typer.BadParameter(f"{run} is finished; training a draft further is another run", param_hint="--run")
    trainer.run()
    record = {"command": ["evospec", "train-draft", *sys.argv[1:]], "validations": trainer.progress.history}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
