"""Reads a model's weights in the dtype, and onto the device, in which plain PyTorch computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from engine.models.weights import WeightSource
from engine.tensor_parallel.ranks import Ranks

_VALUES_AT_ONCE = 2**18
"""Of a matrix, when it is read."""


@dataclass(frozen=True)
class WeightReader:
    """Weights by the names of ``ModelSpec.tensor_shapes``. With ``ranks`` they are this rank's share of them."""

    source: WeightSource
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    ranks: Ranks | None

    def rows(self, *names: str) -> torch.Tensor:
        """This rank's rows of some weights, one below the other."""
        shares = [self._share(self.shapes[name][0]) for name in names]
        heights = [len(share) for share in shares]
        whole = torch.empty(sum(heights), *self.shapes[names[0]][1:], dtype=self.dtype, device=self.device)
        for part, name, share in zip(torch.split(whole, heights), names, shares, strict=True):
            self._fill(part, name, share)
        return whole

    def columns(self, name: str) -> torch.Tensor:
        """This rank's columns of a weight."""
        height, width = self.shapes[name]
        columns = self._share(width)
        whole = torch.empty(height, len(columns), dtype=self.dtype, device=self.device)
        self._fill(whole, name, range(height), columns)
        return whole

    def _share(self, length: int) -> range:
        return range(length)[slice(None) if self.ranks is None else self.ranks.share(length)]

    def _fill(self, out: torch.Tensor, name: str, rows: range, columns: range | None = None) -> None:
        """A few rows at a time, so that the model is nowhere in float32."""
        height = max(_VALUES_AT_ONCE // prod(self.shapes[name][1:]), 1)
        for first in range(0, len(rows), height):
            part = rows[first : first + height]
            values = self.source.dequantized(name, slice(part.start, part.stop))
            out[first : first + len(part)] = values if columns is None else values[:, columns.start : columns.stop]

    def exact(self, name: str) -> torch.Tensor:
        """A whole weight in float32."""
        return self.source.dequantized(name).to(self.device)

    def bias(self, *modules: str) -> torch.Tensor | None:
        """This rank's rows of these modules' biases, one below the other; None where they have none."""
        names = [module + ".bias" for module in modules]
        return self.rows(*names) if names[0] in self.shapes else None

    def bias_of_sum(self, module: str) -> torch.Tensor | None:
        """Of a module whose results all ranks sum: only the first has it. None where there is none."""
        name, is_first = module + ".bias", self.ranks is None or self.ranks.rank == 0
        return self.exact(name).to(self.dtype) if is_first and name in self.shapes else None
