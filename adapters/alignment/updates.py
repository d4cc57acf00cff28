"""Low-rank adapters in training, float32 tensors beside a frozen draft, and their updates from segments of traffic."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from evospec.adapters.alignment.chains import ChainDrafter, ChainStep, SegmentBatch, collate
from evospec.adapters.alignment.curriculum_loss import Curriculum, divergence
from evospec.adapters.alignment.records import Segment
from evospec.adapters.target_parts import with_others
from evospec.engine.adapters_config import AdaptersConfig, LoraTarget
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.lora import adapted_rows, lora_layout
from evospec.kernels.batched_lora import LoraMatrix

_CLIP = 1.0
_TILE = 256
"""Rows of the head come in multiples of it: bf16 products compile a kernel for each number."""
_WARMUP_UPDATES = 32
"""Adam's first steps are as long as later ones, whatever the gradient: at full length they unlearn first, and a key
that went back to the version in force once would be refused for good."""
_MEAN_SHARE, _MEAN_START = 0.03, 9
"""What an update adds to the running mean that is published; a greater share among the first ones."""


@dataclass(frozen=True)
class Lora:
    """One adapter. The adapted rows of a weight W are W + b.T @ a.

    ``tensors`` has ``<target>.a`` [rank, inputs] and ``<target>.b`` [rank, outputs], float32.
    """

    config: Eagle3Config
    tensors: dict[str, torch.Tensor]

    @classmethod
    def fresh(cls, config: Eagle3Config, targets: tuple[LoraTarget, ...], rank: int, key: str = "") -> Lora:
        """An adapter without effect: b is zero, a uniform as in a linear layer, by a generator that ``key`` seeds."""
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
        tensors = {}
        for target in targets:
            rows = adapted_rows(config, target)
            bound = 1 / math.sqrt(rows.num_inputs)
            tensors[f"{target}.a"] = torch.empty(rank, rows.num_inputs).uniform_(-bound, bound, generator=generator)
            tensors[f"{target}.b"] = torch.zeros(rank, rows.end - rows.start)
        return cls(config, tensors)

    @classmethod
    def of_published(cls, config: Eagle3Config, published: Mapping[str, torch.Tensor]) -> Lora:
        """From the tensors of a channel's slot, copied in float32."""
        return cls(config, {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in published.items()})

    @property
    def targets(self) -> list[LoraTarget]:
        return [target for target in get_args(LoraTarget) if f"{target}.a" in self.tensors]

    def published(self) -> dict[str, torch.Tensor]:
        """A copy for the engine, in bf16."""
        return {name: tensor.detach().bfloat16() for name, tensor in self.tensors.items()}

    def add_to(self, out: torch.Tensor, x: torch.Tensor, matrix: LoraMatrix) -> None:
        """Add to the draft's products (``engine.models.eagle3.Additions``), differentiable in the adapter's tensors.

        The adapted weights themselves are never made, so neither are their gradients.
        """
        for target in self.targets:
            rows = adapted_rows(self.config, target)
            if rows.matrix == matrix:
                gain = (x @ self.tensors[f"{target}.a"].T) @ self.tensors[f"{target}.b"]
                out[..., rows.start : rows.end].add_(gain)

    def approach(self, other: Lora, share: float) -> None:
        """Go a share of the way, in place, to another adapter of the same shape."""
        for name, tensor in self.tensors.items():
            tensor.lerp_(other.tensors[name].detach(), share)


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

    def load(self, published: Mapping[str, torch.Tensor] | None, is_own: bool = False) -> None:
        """Go on from these weights, None: the base draft's, with a fresh optimiser.

        ``is_own``: this server has learned them itself, and may go on from what it has not published yet.
        """
        self._num_updates = 0
        self._optimizer = self._start(published)

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
