"""Where a model's weights come from: tensors by their Hugging Face name, as stored or as float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.families.known import family_of
from evospec.engine.models.gguf_file import GGUFFile, GGUFTensor
from evospec.engine.models.gguf_spec import gguf_tensor_names, spec_from_gguf
from evospec.engine.models.quantization.base import Matrix, QuantizedMatrix
from evospec.engine.models.safetensors_spec import checked_tensors, read_config
from evospec.engine.models.stored_tensors import StoredRows, stored_rows

Rows = slice | npt.NDArray[np.int64]
ALL = slice(None)
_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_MAPPED_BYTES = 2**24
"""Of safetensors files that may stay in memory when they were read"""


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in the blocks of GGUF, as they are stored, or made of what other files store.

    ``blocks`` reads some rows: uint8 [rows, bytes per row]. Rows follow the Hugging Face order (rotary halves, not
    interleaved).
    """

    blocks: Callable[[Rows], npt.NDArray[np.uint8]]
    type: GGMLQuantizationType


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix of FP8 numbers, each row times a scale."""

    codes: Callable[[slice], torch.Tensor]
    """Reads those of some rows, [rows, columns] float8_e4m3fn"""
    scales: torch.Tensor
    """[rows] float32"""


class WeightSource(ABC):
    """Weights of one model, memory-mapped: nothing is read before it is asked for, and nothing read stays in memory.

    Names are those of ``ModelSpec.tensor_shapes``; all methods raise ``ModelError`` for any other.
    """

    @abstractmethod
    def dequantized(self, name: str, rows: slice = ALL) -> torch.Tensor:
        """Some rows of the tensor as float32 on the CPU, in their own memory."""

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's quantised blocks; None where it is stored as what no blocks can hold."""

    def fp8(self, name: str) -> Fp8Tensor | None:
        """The tensor's FP8 numbers; None where it is not stored as FP8 with one scale a row, or one for all."""
        return None


def open_weights(files: ModelFiles) -> WeightSource:
    """The weights of ``files``, which ``engine.models.registry.validate_model_files`` has accepted."""
    return _GGUFWeights(files.path) if files.format == "gguf" else _SafetensorsWeights(files.path)


class _GGUFWeights(WeightSource):
    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._spec = spec_from_gguf(self._file)
        self._file.metadata.clear()  # a vocabulary of tens of megabytes
        self._places, self._shapes = stored_rows(self._spec, stacks_experts=True), self._spec.tensor_shapes()
        self._stored_names = gguf_tensor_names(self._spec)
        self._interleaves = family_of(self._spec.architecture).gguf_interleaves_rotary

    def dequantized(self, name: str, rows: slice = ALL) -> torch.Tensor:
        values = torch.from_numpy(gguf.quants.dequantize(self._blocks(name, rows), self._tensor(name).type))
        return values if len(self._shapes[name]) > 1 else values[0, rows]

    def quantized(self, name: str) -> QuantizedTensor | None:
        kind = self._tensor(name).type
        return None if kind in _FLOAT_TYPES else QuantizedTensor(partial(self._blocks, name), kind)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._places:
            raise ModelError(f"{self._file.path}: no tensor {name!r}")
        return self._file.tensors[self._stored_names[self._places[name].tensor]]

    def _blocks(self, name: str, rows: Rows) -> npt.NDArray[np.uint8]:
        """Bytes of a matrix's rows; of a vector all bytes, as one row."""
        tensor, place = self._tensor(name), self._places[name]
        index = place.index or 0
        if len(self._shapes[name]) == 1:
            return self._file.data(tensor.name, slice(index, index + 1))
        stored = np.arange(place.count) + place.first + index * place.count
        if self._interleaves and (".q_proj." in name or ".k_proj." in name):
            heads = self._spec.num_heads if ".q_proj." in name else self._spec.num_kv_heads
            stored = _uninterleave_rotary(stored, heads)
        return self._file.data(tensor.name, stored[rows])


def _uninterleave_rotary(rows: npt.NDArray[np.int64], num_heads: int) -> npt.NDArray[np.int64]:
    """Undo llama.cpp's order of q and k rows.

    Within a head it stores rotary pairs next to each other (0, D/2, 1, D/2 + 1, ...) for llama
    models; the Hugging Face order has the two halves one after the other. [H * D] → the same.
    """
    return rows.reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


class _SafetensorsWeights(WeightSource):
    """Of ``model*.safetensors`` in a directory. Pickled files are never opened."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        spec, self._quantization = read_config(directory)
        self._places = stored_rows(spec, stacks_experts=False)
        self._norm_offset = family_of(spec.architecture).norm_offset
        self._stored = checked_tensors(directory, spec, self._quantization)  # the files may be others than before
        self._last: tuple[str, Matrix] | None = None
        """The matrix that was read last: its next rows are probably read next"""
        self._open: dict[Path, Any] = {}
        self._num_mapped = 0

    def dequantized(self, name: str, rows: slice = ALL) -> torch.Tensor:
        matrix, place = self._matrix(name), self._place(name)
        if matrix is not None:
            return torch.from_numpy(matrix.dequantized(place.part(rows)))
        tensor = self._read(place.tensor, place.part(rows), place.index, has_columns_first=len(place.shape) == 3)
        tensor = tensor.to(torch.float32, copy=True)
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor

    def quantized(self, name: str) -> QuantizedTensor | None:
        matrix = self._matrix(name)
        kind = None if matrix is None else matrix.block_type
        if matrix is None or kind is None:
            return None
        place = self._places[name]

        def blocks(rows: Rows) -> npt.NDArray[np.uint8]:
            return matrix.blocks(place.part(rows)) if isinstance(rows, slice) else matrix.blocks(place.part(ALL))[rows]

        return QuantizedTensor(blocks, kind)

    def fp8(self, name: str) -> Fp8Tensor | None:
        matrix, place = self._matrix(name), self._place(name)
        if not isinstance(matrix, QuantizedMatrix) or matrix.bits is not None or matrix.groups.any():
            return None

        def codes(rows: slice) -> torch.Tensor:
            return torch.from_numpy(matrix.codes(place.part(rows))).to(torch.float8_e4m3fn)

        return Fp8Tensor(codes, torch.from_numpy(matrix.scales[place.part(ALL), 0]))

    def _matrix(self, name: str) -> Matrix | None:
        """What the tensor is some rows of; None where it is stored as floating-point numbers."""
        if (last := self._last) is not None and last[0] == name:
            return last[1]
        place, quantization = self._place(name), self._quantization
        module = None if quantization is None else quantization.module_of(place.tensor, place.shape, self._stored)
        if quantization is None or module is None:
            return None
        try:
            matrix = quantization.matrix(partial(self._part, module, place.index), *place.shape[-2:])
        except ModelError as error:
            raise ModelError(f"{self._directory}: {module}: {error}") from None
        self._last = name, matrix
        return matrix

    def _part(self, module: str, index: int | None, part: str, rows: slice = ALL) -> npt.NDArray[Any]:
        tensor = self._read(f"{module}.{part}", rows, index)
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def _read(self, name: str, rows: slice, index: int | None = None, has_columns_first: bool = False) -> torch.Tensor:
        """Some rows of a stored tensor, mapped, or of this one of its matrices or vectors.

        A file is closed, and opened again, when much of it was read.
        """
        path, stored_name = self._stored[name]
        if self._num_mapped > _MAPPED_BYTES:
            self._open, self._num_mapped = {}, 0
        within = slice(rows.start, rows.stop)  # steps it cannot read
        try:
            if (file := self._open.get(path)) is None:
                file = self._open[path] = safe_open(path, framework="pt")
            stored = file.get_slice(stored_name)
            if index is not None:
                tensor = stored[index, :, within].T if has_columns_first else stored[index, within]
            else:
                tensor = stored[...] if rows == ALL else stored[within]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {stored_name!r} cannot be read any more: {error}") from error
        self._num_mapped += tensor.nbytes
        read: torch.Tensor = tensor[:: rows.step] if rows.step else tensor
        return read

    def _place(self, name: str) -> StoredRows:
        if name not in self._places:
            raise ModelError(f"{self._directory}: no tensor {name!r}")
        return self._places[name]
