"""Matrices that activations are multiplied with, in the precision in which a device keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from evospec.kernels.fp8 import fp8_product
from evospec.kernels.int4 import int4_product


class Projection(Protocol):
    """A matrix [n, k], and maybe a bias."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, k] → [T, n], ``x``'s dtype."""


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    """[n, k], of the activations' dtype"""
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Fp8Linear:
    """The weights of a checkpoint in FP8 as they are. Activations are rounded to FP8, too, each row by its largest."""

    weight: torch.Tensor
    """[n, k] float8_e4m3fn"""
    scales: torch.Tensor
    """[n] float32"""
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = fp8_product(x, self.weight, self.scales)
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class Int4Linear:
    """The weights of a checkpoint in 4 bits as they are."""

    codes: torch.Tensor
    """[n, k / 2] uint8, as ``int4_product`` has them"""
    scales: torch.Tensor
    """[n, k / 32, 2] float16, and minima"""
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product = int4_product(x, self.codes, self.scales)
        return product if self.bias is None else product + self.bias
