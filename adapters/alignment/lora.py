"""Low-rank adapters in training: float32 tensors beside a frozen draft."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.adapters_config import LoraTarget
from engine.models.eagle3_config import Eagle3Config
from engine.models.lora import adapted_rows
from kernels.batched_lora import LoraMatrix


@dataclass(frozen=True)
class Lora:
    """One adapter. The adapted rows of a weight W are W + b.T @ a.

    ``tensors`` has ``<target>.a`` [rank, inputs] and ``<target>.b`` [rank, outputs], float32.
    """

    config: Eagle3Config
    targets: tuple[LoraTarget, ...]
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
        return cls(config, targets, tensors)

    @classmethod
    def of_published(cls, config: Eagle3Config, published: Mapping[str, torch.Tensor]) -> Lora:
        """From the tensors of a channel's slot, copied in float32."""
        targets: list[LoraTarget] = [name.removesuffix(".a") for name in published if name.endswith(".a")]  # type: ignore[misc]
        tensors = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in published.items()}
        return cls(config, tuple(targets), tensors)

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
