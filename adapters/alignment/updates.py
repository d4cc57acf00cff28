"""Updates of an adapter from segments of traffic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.alignment.chains import ChainDrafter, ChainStep, SegmentBatch, collate
from adapters.alignment.curriculum_loss import Curriculum, divergence
from adapters.alignment.lora import Lora
from adapters.alignment.records import Segment
from adapters.target_parts import with_others
from engine.adapters_config import AdaptersConfig
from engine.models.lora import lora_layout

_CLIP = 1.0
_TILE = 256
"""Rows of the head come in multiples of it: bf16 products compile a kernel for each number."""
_WARMUP_UPDATES = 32
"""Adam's first steps are as long as later ones, whatever the gradient: at full length they unlearn first, and a key
that went back to the version in force once would be refused for good."""
_MEAN_SHARE, _MEAN_START = 0.03, 9
"""What an update adds to the running mean that is published; a greater share among the first ones."""


@dataclass(frozen=True)
class Update:
    """What one update did. ``loss`` is that of the positions before they were learned from."""

    loss: float
    num_positions: int
    seconds: float  # CPU time of this process, all threads together: a clock would count what others do meanwhile


class Updater:
    """AdamW on one key's low-rank adapter, with the paper's loss; the draft is frozen.

    The adapter decays towards none at all, as far as the updates do not hold it.

    What is published is a running mean of the adapter over the last updates (Polyak's): each is of two answers, and
    moves it by what these have in common with the domain, and by what they have not.

    Args:
        base: the base draft.
        config: rank, targets, loss and learning rate.
        key: seeds the adapter.
        fingerprint: the base draft's.
    """

    trains_fusion = False
    """Whether the draft's fusion of features is trained, and so wants them as they were."""
    grows = False
    """Whether there is no draft before what it trains, and it wants the last layer's output behind the features."""

    def __init__(self, base: ChainDrafter, config: AdaptersConfig, key: str, fingerprint: str) -> None:
        self._base, self._config, self._key = base, config, key
        self._learning_rate = config.training.learning_rate
        self._generator = torch.Generator().manual_seed(0)
        self.layout = lora_layout(base.draft.config, config.rank, config.targets, fingerprint)
        """The layout of what ``published`` returns."""
        self.load(None)

    def load(self, published: Mapping[str, torch.Tensor] | None) -> None:
        """Go on from these weights, None: the base draft's, with a fresh optimiser."""
        self._num_updates = 0
        self._optimizer = self._start(published)

    def adopt(self, published: Mapping[str, torch.Tensor] | None) -> None:
        """Go on from these weights, which this server has learned itself; what it had not published yet is kept."""
        self.load(published)

    def resume(self, directory: Path) -> None:
        """Go on from where an earlier process was, by files in ``directory``; an adapter, by what it has published."""

    def update(self, segments: Sequence[Segment]) -> Update:
        """Take one step of the optimiser on all chains of some segments, at least one."""
        started = time.process_time()
        batch = collate(segments, self._config.training.horizon)
        loss = divergence(self._steps(batch), self._config.training.temperature)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._num_updates += 1
        [group] = self._optimizer.param_groups
        group["lr"] = self._learning_rate * min(1.0, self._num_updates / _WARMUP_UPDATES)
        norm = torch.nn.utils.clip_grad_norm_(group["params"], _CLIP)
        if norm.isfinite():
            self._optimizer.step()
        self._follow()
        return Update(float(loss.detach()), len(batch.starts), time.process_time() - started)

    def published(self) -> dict[str, torch.Tensor]:
        """A copy of what the engine is given."""
        return self._mean.published()

    def drafter(self, published: Mapping[str, torch.Tensor]) -> ChainDrafter:
        """The draft that the engine has with these weights."""
        return replace(self._base, lora=Lora.of_published(self._base.draft.config, published))

    def _start(self, published: Mapping[str, torch.Tensor] | None) -> torch.optim.Optimizer:
        """Set the weights; returns an optimiser for them."""
        config, shape = self._config, self._base.draft.config
        self._lora, self._mean = (
            Lora.fresh(shape, config.targets, config.rank, self._key)
            if published is None
            else Lora.of_published(shape, published)
            for _ in range(2)
        )
        parameters = [tensor.requires_grad_() for tensor in self._lora.tensors.values()]
        return torch.optim.AdamW(parameters, weight_decay=self._config.training.weight_decay)

    def _steps(self, batch: SegmentBatch) -> list[ChainStep]:
        """What the draft in training says along a batch's chains."""
        training, vocab_size = self._config.training, len(self._base.target.head)
        uniform = torch.rand(len(batch.starts), generator=self._generator)
        # The batch's own tokens and random others, which are all wrong answers.
        drawn = torch.randint(0, vocab_size, (training.random_rows,), generator=self._generator)
        rows = with_others(batch.wanted_ids, drawn, _TILE, self._generator)
        return replace(self._base, lora=self._lora).steps(batch, rows, Curriculum(training.beta, uniform))

    def _follow(self) -> None:
        """Let what is published follow what was trained."""
        self._mean.approach(self._lora, max(_MEAN_SHARE, _MEAN_START / (_MEAN_START + self._num_updates)))
