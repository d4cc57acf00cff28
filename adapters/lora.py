"""Low-rank adapters in training: float32 tensors beside a frozen draft."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.adapters_config import LoraTarget
from engine.ipc.weight_layout import WeightLayout
from engine.models.eagle3 import Eagle3, Eagle3Config
from engine.models.lora import adapted_rows, lora_layout


@dataclass(frozen=True)
class Lora:
    """One adapter. The adapted rows of a weight W are W + alpha / rank · b @ a.

    ``tensors`` has ``<target>.a`` [rank, inputs] and ``<target>.b`` [outputs, rank], float32.
    """

    config: Eagle3Config
    targets: tuple[LoraTarget, ...]
    alpha: float
    tensors: dict[str, torch.Tensor]

    @classmethod
    def fresh(
        cls, config: Eagle3Config, targets: tuple[LoraTarget, ...], rank: int, alpha: float, key: str = ""
    ) -> Lora:
        """An adapter without effect: b is zero, a uniform as in a linear layer, by a generator that ``key`` seeds."""
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
        tensors = {}
        for target in targets:
            rows = adapted_rows(config, target)
            bound = 1 / math.sqrt(rows.num_inputs)
            tensors[f"{target}.a"] = torch.empty(rank, rows.num_inputs).uniform_(-bound, bound, generator=generator)
            tensors[f"{target}.b"] = torch.zeros(rows.end - rows.start, rank)
        return cls(config, targets, alpha, tensors)

    @property
    def rank(self) -> int:
        return len(self.tensors[f"{self.targets[0]}.a"])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def layout(self, base: str, dtype: torch.dtype = torch.bfloat16) -> WeightLayout:
        """Of the weight channel that takes ``published``."""
        return lora_layout(self.config, self.rank, self.targets, base, dtype)

    def published(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        """A copy for the engine: the scale is in b."""
        return {
            name: (tensor.detach() * (self.scale if name.endswith(".b") else 1.0)).to(dtype)
            for name, tensor in self.tensors.items()
        }

    def load(self, published: Mapping[str, torch.Tensor]) -> None:
        """Take over, in place, what ``published`` gave."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(published[name]).mul_(1 / self.scale if name.endswith(".b") else 1.0)

    def copy(self) -> Lora:
        """With tensors of its own, not to be trained."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return Lora(self.config, self.targets, self.alpha, tensors)

    def approach(self, other: Lora, share: float) -> None:
        """Go a share of the way, in place, to another adapter of the same shape."""
        for name, tensor in self.tensors.items():
            tensor.lerp_(other.tensors[name].detach(), share)


def merged(draft: Eagle3, lora: Lora) -> dict[str, torch.Tensor]:
    """The adapted weights by name, differentiable in the adapter's tensors; the draft stays as it is."""
    deltas = {
        target: lora.scale * (lora.tensors[f"{target}.b"] @ lora.tensors[f"{target}.a"]) for target in lora.targets
    }
    return _added(draft, lora.config, deltas)


def merge_published(draft: Eagle3, published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same from the tensors of a channel's slot."""
    names: list[LoraTarget] = [name.removesuffix(".a") for name in published if name.endswith(".a")]  # type: ignore[misc]
    deltas = {name: published[f"{name}.b"].float() @ published[f"{name}.a"].float() for name in names}
    return _added(draft, draft.config, deltas)


def _added(draft: Eagle3, config: Eagle3Config, deltas: Mapping[LoraTarget, torch.Tensor]) -> dict[str, torch.Tensor]:
    pieces: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
    for target, delta in deltas.items():
        rows = adapted_rows(config, target)
        pieces.setdefault(rows.name, []).append((rows.start, rows.end, delta))
    weights = {}
    for name, of_rows in pieces.items():
        base, parts, position = draft.get_parameter(name), [], 0
        for start, end, delta in sorted(of_rows, key=lambda piece: piece[0]):
            parts += [base[position:start], base[start:end] + delta]
            position = end
        weights[name] = torch.cat([*parts, base[position:]])
    return weights
