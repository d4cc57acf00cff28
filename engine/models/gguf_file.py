"""Reads a GGUF file: metadata and tensor table parsed at once, tensor data memory-mapped.

The ``gguf`` package's own reader needs 6 seconds for a vocabulary of 150,000 tokens and can loop for ever on a
corrupt length, and both the server and the engine read the header at start; so the header is parsed here, with
every length checked against the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import GGUFReader

from evospec.engine.models.config import ModelError

_LENGTH = struct.Struct("<Q")
_MAX_DIMS = 4
_T = TypeVar("_T", int, float, bool, str)


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file. ``shape`` is in row-major order: (rows, columns)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUFFile:
    """Metadata and tensors of one GGUF file (version 2 or 3, little-endian).

    Raises:
        ModelError: the file cannot be read, is not GGUF, or its header or tensor data run past its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{path}: cannot be read: {error}") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse()
        except (struct.error, ValueError, OverflowError) as error:
            raise ModelError(f"{path}: corrupt or truncated GGUF header: {error}") from error

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """A metadata entry, None if it is absent; ``ModelError`` if it has another type."""
        value = self.metadata.get(key)
        if value is not None and type(value) is not kind:
            raise ModelError(f"{key} is {value!r:.40}, must be of type {kind.__name__}")
        return value

    def require(self, key: str, kind: type[_T]) -> _T:
        """A metadata entry; ``ModelError`` if it is absent or has another type."""
        value = self.get(key, kind)
        if value is None:
            raise ModelError(f"{key} is missing")
        return value

    def get_list(self, key: str, kind: type[_T]) -> list[_T]:
        """An array of the metadata, empty if it is absent; ``ModelError`` if it is something else."""
        values = self.metadata.get(key, [])
        # Elements of a GGUF array have one type, so the first stands for all.
        if not isinstance(values, list) or (values and type(values[0]) is not kind):
            raise ModelError(f"{key} is {values!r:.40}, must be an array of type {kind.__name__}")
        return values

    def data(self, name: str, rows: npt.NDArray[np.integer] | slice = slice(None)) -> npt.NDArray[np.uint8]:
        """Bytes of a tensor's rows as stored, [rows, bytes per row], in their own memory."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        copied = flat.reshape(prod(tensor.shape[:-1]), -1)[rows].copy()
        self._map.madvise(mmap.MADV_DONTNEED)  # what was read of the file need not be in memory as well
        return copied

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file")
        self._offset = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        for _ in range(num_entries):
            key = self._string()
            self.metadata[key] = self._value(GGUFValueType(self._scalar("I")))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        self._place_tensors(infos)

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._offset)[0]
        self._offset += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """So many in a row; a vocabulary has some hundred thousand."""
        content, size, end, strings = self._map, len(self._map), self._offset, list[str]()
        for _ in range(count):
            start = end + _LENGTH.size
            end = start + _LENGTH.unpack_from(content, end)[0]
            if end > size:
                raise ValueError(f"a string of {end - start} bytes runs past the end of the file")
            strings.append(content[start:end].decode())
        self._offset = end
        return strings

    def _value(self, kind: GGUFValueType) -> Any:
        if kind != GGUFValueType.ARRAY:
            return self._values(kind, 1)[0]
        kind, count = GGUFValueType(self._scalar("I")), self._scalar("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("nested arrays are not supported")
        return self._values(kind, count)

    def _values(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return self._strings(count)
        values = np.frombuffer(self._map, GGUFReader.gguf_scalar_to_np[kind], count, self._offset)
        self._offset += values.nbytes
        return list(values.tolist())

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        num_dims = self._scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
        dims = [self._scalar("Q") for _ in range(num_dims)]
        kind = self._scalar("I")
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(f"{self.path}: tensor {name!r} has the unknown type {kind}") from None
        return name, tensor_type, tuple(reversed(dims)), self._scalar("Q")

    def _place_tensors(self, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self._offset // alignment) * alignment
        for name, tensor_type, shape, offset in infos:
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
            if prod(shape) == 0 or shape[-1] % block:
                raise ValueError(f"tensor {name!r} of type {tensor_type.name} has the shape {shape}")
            if name in self.tensors:
                raise ValueError(f"tensor {name!r} appears twice")
            tensor = GGUFTensor(name, tensor_type, shape, start + offset, prod(shape) // block * block_bytes)
            if tensor.offset + tensor.num_bytes > len(self._map):
                raise ModelError(
                    f"{self.path}: truncated: tensor {name!r} ends at byte {tensor.offset + tensor.num_bytes:,}, "
                    f"the file has {len(self._map):,}"
                )
            self.tensors[name] = tensor
