"""Which tensors a published version consists of, and where they lie in its buffer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightLayout:
    """Names, shapes and dtypes, and ``base``: what the weights belong to, such as the hash of the draft they adapt.

    Adapters of another draft may have the same shapes, and must not be taken for this draft's.
    """

    tensors: tuple[TensorSpec, ...]
    base: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], base: str = "") -> WeightLayout:
        """The layout of ``tensors``, whatever their order."""
        return cls(tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in sorted(tensors.items())), base)

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of the whole layout, 32 bytes."""
        described = [self.base, *([spec.name, spec.shape, str(spec.dtype)] for spec in self.tensors)]
        return hashlib.sha256(json.dumps(described).encode()).digest()

    @cached_property
    def nbytes(self) -> int:
        """Size of a buffer for one version, a multiple of 64."""
        return sum(_aligned(spec.nbytes) for spec in self.tensors)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors inside ``buffer``, uint8 [nbytes]."""
        views = {}
        offset = 0
        for spec in self.tensors:
            views[spec.name] = buffer[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)
            offset += _aligned(spec.nbytes)
        return views

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise ``ValueError`` if ``tensors`` are of another layout."""
        if tensors.keys() != {spec.name for spec in self.tensors}:
            raise ValueError(f"expected the tensors {[spec.name for spec in self.tensors]}, not {list(tensors)}")
        for spec in self.tensors:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}; the layout says {spec}")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
