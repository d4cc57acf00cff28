"""What all ways to quantise safetensors have in common: numbers that share a scale in groups of columns. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from evospec.engine.models.config import ModelError

FLOATS = ("F32", "F16", "BF16")
"""Types of tensors, as safetensors calls them"""
_BLOCK = 32
"""Columns of a GGUF block"""
_BLOCK_TYPES = {4: GGMLQuantizationType.Q4_1, 8: GGMLQuantizationType.Q8_0}
_LARGEST_SCALE = 4096.0
"""Times 15 it is still a number of half precision."""

_Value = TypeVar("_Value", int, str)
Array = npt.NDArray[Any]
Read = Callable[..., Array]
"""A part of a module by its name, and maybe some rows of it: integers as stored, other numbers as float32."""


class Part(NamedTuple):
    """A tensor that a quantised matrix is stored in: the types that it may have, and its shape."""

    types: tuple[str, ...]
    shape: tuple[int, ...]


class Matrix(Protocol):
    """A quantised matrix [n, k]."""

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """The GGUF type that holds the same numbers; None where there is none."""

    def blocks(self, rows: slice) -> npt.NDArray[np.uint8]:
        """Its blocks of ``block_type``, [rows, bytes]."""

    def dequantized(self, rows: slice) -> npt.NDArray[np.float32]:
        """[rows, k]"""


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [n, k] as weight[i, j] = scales[i, g] * (codes[i, j] - zeros[i, g]), where g = groups[j]."""

    codes: Callable[[slice], Array]
    """Reads those of some rows: uint8 [rows, k]; float32 where they are floating-point numbers of 8 bits"""
    bits: int | None
    """Of a code that is an integer; None: it is none"""
    scales: npt.NDArray[np.float32]
    """[n, groups]"""
    zeros: Array | None
    """Integers [n, groups]; None: all zero"""
    groups: Array
    """Of each column, [k]"""

    def dequantized(self, rows: slice) -> npt.NDArray[np.float32]:
        values = self.codes(rows).astype(np.float32)
        if self.zeros is not None:
            values -= self.zeros[rows].take(self.groups, axis=1)
        values *= self.scales[rows].take(self.groups, axis=1)
        return values

    @property
    def block_type(self) -> GGMLQuantizationType | None:
        """The GGUF type that holds the same integers; None where there is none.

        Q4_1 has a scale and a minimum, scale * -zero, for 32 columns; Q8_0 has a scale only. Both have half precision,
        in which a float16 scale is exact, a bfloat16 one from 2^-17 on, and a minimum where zero is 8; any other one is
        rounded by up to 2^-11 of itself: 0.0074 times the scale at most.
        """
        by_block = self.groups[: len(self.groups) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        if by_block.size < len(self.groups) or (by_block != by_block[:, :1]).any():
            return None
        is_symmetric = self.zeros is not None and bool((self.zeros == 128).all())
        if self.bits is None or (self.bits == 8 and not is_symmetric) or np.abs(self.scales).max() > _LARGEST_SCALE:
            return None
        return _BLOCK_TYPES[self.bits]

    def blocks(self, rows: slice) -> npt.NDArray[np.uint8]:
        assert self.zeros is not None
        scales, zeros = self.scales[rows], self.zeros[rows]
        codes = self.codes(rows).reshape(len(scales), -1, _BLOCK)
        groups = self.groups[::_BLOCK]
        parts = [scales[:, groups]]
        if self.bits == 4:
            parts.append((-zeros.astype(np.float32) * scales)[:, groups])
            codes = codes[..., :16] | codes[..., 16:] << 4
        else:
            codes = codes ^ 128
        halves = [part.astype(np.float16)[..., None].view(np.uint8) for part in parts]
        return np.concatenate([*halves, codes], axis=-1).reshape(len(codes), -1)


class Quantization(ABC):
    """How a checkpoint stores its quantised matrices; those of modules without a ``scale`` are stored as usual."""

    scale: str
    dimensions: int = 2
    """Of what is quantised: with 3 a tensor is several matrices"""

    def module_of(self, name: str, shape: tuple[int, ...], stored: Container[str]) -> str | None:
        """The module of a weight that is quantised, by the names of all tensors; None where it is not."""
        module = name.removesuffix(".weight")
        return module if len(shape) == self.dimensions and f"{module}.{self.scale}" in stored else None

    @abstractmethod
    def parts(self, n: int, k: int) -> dict[str, Part]:
        """What a matrix [n, k] is stored in, by what follows its module's name; of several matrices, what each is."""

    @abstractmethod
    def matrix(self, read: Read, n: int, k: int) -> Matrix:
        """The matrix [n, k] whose parts ``read`` gives; ``ModelError`` where what they say is impossible."""


@dataclass(frozen=True)
class Groups:
    """So many rows or columns next to each other have one scale; with -1 all of them."""

    size: int

    def __post_init__(self) -> None:
        if self.size != -1 and self.size <= 0:
            raise ModelError(f"not supported: groups of {self.size}")

    def count(self, length: int) -> int:
        """How many there are in so many rows or columns."""
        return -(-length // self._size(length))

    def of(self, length: int) -> Array:
        """The group of each of so many rows or columns."""
        return np.arange(length) // self._size(length)

    def _size(self, length: int) -> int:
        return length if self.size == -1 else min(self.size, length)


def checked_groups(groups: Array, count: int) -> Array:
    """The group of each column as a file says; ``ModelError`` where there are only ``count`` groups."""
    if groups.min() < 0 or groups.max() >= count:
        raise ModelError(f"a column is in group {groups.max()} of {count}")
    return groups


def read_once(read: Callable[[], Array]) -> Callable[[], Array]:
    """What ``read`` gives, from the first call on. Threads pack a matrix together: others wait for the first."""
    lock, kept = Lock(), cache(read)

    def of_first() -> Array:
        with lock:
            return kept()

    return of_first


def supported(key: str, value: _Value, allowed: tuple[_Value, ...]) -> _Value:
    """``value``, or ``ModelError`` where it is not one of ``allowed``."""
    if value not in allowed:
        raise ModelError(f"not supported: {key} = {value!r} (supported: {', '.join(map(str, allowed))})")
    return value


def num_words(count: int, bits: int) -> int:
    """So many int32 hold ``count`` codes."""
    return -(-count * bits // 32)


def unpacked(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Codes of 4 or 8 bits out of int32 [rows, words], the lowest bits of a word first: [rows, count]."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)
    return octets[:, :count]
