"""Updates of a draft's weights from segments of traffic: the paper's way, and two baselines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from adapters.chains import ChainBatch, Chains, Weights, collate
from adapters.curriculum_loss import Curriculum, divergence
from adapters.lora import Lora
from adapters.records import Segment
from engine.adapters_config import AdaptersConfig
from engine.ipc.weight_layout import WeightLayout
from engine.models.lora import whole_layout

_CLIP = 1.0
_WARMUP_UPDATES = 32
"""Adam's first steps are as long as later ones, whatever the gradient: at full length they unlearn first, and a key
that went back to the version in force once would be refused for good."""
_MEAN_SHARE, _MEAN_START = 0.03, 9
"""What an update adds to the running mean that is published; a greater share among the first ones."""
_OSD_RATE = 0.01
"""All weights at once need smaller steps than two thin matrices, one of them zero at first."""


@dataclass(frozen=True)
class Update:
    """What one update did. ``loss`` is that of the positions before they were learned from."""

    loss: float
    num_positions: int
    seconds: float
    """Of this process, all threads together: the clock's would count what others do meanwhile."""


class Trainer(Protocol):
    """Owns the weights of one key."""

    layout: WeightLayout
    """Of ``published``"""

    def update(self, segments: Sequence[Segment]) -> Update:
        """One step of the optimiser on all chains of some segments, at least one."""
        ...

    def published(self) -> dict[str, torch.Tensor]:
        """A copy of what the engine is given."""
        ...

    def load(self, published: Mapping[str, torch.Tensor] | None) -> None:
        """Go on from these weights, None: the base draft's, with a fresh optimiser."""
        ...

    def weights(self, published: Mapping[str, torch.Tensor] | None = None) -> Weights:
        """Of ``published``; default: those in training themselves, which the next update changes."""
        ...


class LoraTrainer:
    """AdamW on a low-rank adapter; the draft is frozen. The paper's way, with ``method`` curriculum.

    What is published is a running mean of the adapter over the last updates (Polyak's): each is of two answers, and
    moves it by what these have in common with the domain, and by what they have not.

    Args:
        chains: of the base draft.
        config: rank, targets, loss and learning rate.
        key: seeds the adapter.
        base: the draft's fingerprint.
    """

    def __init__(self, chains: Chains, config: AdaptersConfig, key: str, base: str) -> None:
        self._chains, self._config, self._key = chains, config, key
        training = config.training
        self._beta = 0.0 if training.method == "plain" else training.beta
        self._generator = torch.Generator().manual_seed(0)
        self._fresh()
        self.layout = self._lora.layout(base)

    def update(self, segments: Sequence[Segment]) -> Update:
        started = time.process_time()
        batch = collate(segments, self._config.training.horizon)
        uniform = torch.rand(len(batch.starts), generator=self._generator)
        steps = self._chains.steps(batch, self._lora, self._rows(batch), Curriculum(self._beta, uniform))
        loss = divergence(steps, self._config.training.temperature)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._num_updates += 1
        _step(self._optimizer, self._lora.tensors.values(), self._config.training.learning_rate, self._num_updates)
        self._mean.approach(self._lora, max(_MEAN_SHARE, _MEAN_START / (_MEAN_START + self._num_updates)))
        return Update(float(loss.detach()), len(batch.starts), time.process_time() - started)

    def published(self) -> dict[str, torch.Tensor]:
        return self._mean.published()

    def load(self, published: Mapping[str, torch.Tensor] | None) -> None:
        self._fresh()
        if published is not None:
            self._lora.load(published)
            self._mean = self._lora.copy()

    def weights(self, published: Mapping[str, torch.Tensor] | None = None) -> Lora:
        return self._lora if published is None else Lora.of_published(self._lora.config, published)

    def _fresh(self) -> None:
        config = self._config
        self._lora = Lora.fresh(self._chains.draft.config, config.targets, config.rank, config.alpha, self._key)
        self._mean = self._lora.copy()
        self._num_updates = 0
        for tensor in self._lora.tensors.values():
            tensor.requires_grad_()
        self._optimizer = torch.optim.AdamW(self._lora.tensors.values(), weight_decay=0.0)

    def _rows(self, batch: ChainBatch) -> torch.Tensor:
        """The batch's own tokens and random others, which are all wrong answers."""
        count, vocab = self._config.training.random_rows, len(self._chains.target.head)
        drawn = torch.randint(0, vocab, (count,), generator=self._generator)
        rows: torch.Tensor = torch.unique(torch.cat((batch.wanted_ids, drawn)))
        return rows


class OsdTrainer:
    """Adam on all of a copy of the draft, every step of a chain the same weight, over the whole head.

    Full-parameter online distillation (Online Speculative Decoding, arXiv 2310.07177), the paper's baseline.
    Arguments as for ``LoraTrainer``.
    """

    def __init__(self, chains: Chains, config: AdaptersConfig, key: str, base: str) -> None:
        self._chains, self._config = chains, config
        self._fresh()
        self.layout = whole_layout(chains.draft.config, base)

    def update(self, segments: Sequence[Segment]) -> Update:
        started = time.process_time()
        batch = collate(segments, self._config.training.horizon)
        everything = torch.arange(len(self._chains.target.head))
        steps = self._chains.steps(batch, self._weights, everything)
        loss = divergence(steps, self._config.training.temperature)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._num_updates += 1
        rate = self._config.training.learning_rate * _OSD_RATE
        _step(self._optimizer, self._weights.values(), rate, self._num_updates)
        return Update(float(loss.detach()), len(batch.starts), time.process_time() - started)

    def published(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().bfloat16() for name, weight in self._weights.items()}

    def load(self, published: Mapping[str, torch.Tensor] | None) -> None:
        self._fresh()
        if published is not None:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(published[name])

    def weights(self, published: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        if published is None:
            return self._weights
        return {name: weight.float() for name, weight in published.items()}

    def _fresh(self) -> None:
        self._weights = {
            name: weight.detach().clone().requires_grad_() for name, weight in self._chains.draft.named_parameters()
        }
        self._num_updates = 0
        self._optimizer = torch.optim.Adam(self._weights.values())


def make_trainer(chains: Chains, config: AdaptersConfig, key: str, base: str) -> Trainer:
    """The trainer that ``config.training.method`` asks for."""
    kind = OsdTrainer if config.training.method == "osd" else LoraTrainer
    return kind(chains, config, key, base)


def _step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], learning_rate: float, num_updates: int
) -> None:
    """Move by the gradients, cut to a norm of 1; gradients that are no numbers move nothing.

    ``num_updates`` of this optimiser, this one included: the first ones are smaller.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * min(1.0, num_updates / _WARMUP_UPDATES)
    tensors = [tensor for tensor in parameters if tensor.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(tensors, _CLIP)
    if norm.isfinite():
        optimizer.step()
