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
from safetensors import safe_open

from engine.models.config import ModelError, ModelFiles
from engine.models.families.known import family_of
from engine.models.gguf_file import GGUFFile
from engine.models.gguf_spec import gguf_tensor_names, spec_from_gguf
from engine.models.quantization.base import QuantizedMatrix
from engine.models.safetensors_spec import plain_name, read_quantization, read_spec, weight_files
from engine.models.stored_tensors import StoredRows, stored_rows

_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix in the blocks of GGUF, as they are stored, or made of what other files store.

    ``blocks`` reads uint8 [rows, bytes per row], usually memory-mapped; ``shape`` is (rows, columns) in weights.
    Rows follow the Hugging Face order (rotary halves, not interleaved).
    """

    blocks: Callable[[], npt.NDArray[np.uint8]]
    type: GGMLQuantizationType
    shape: tuple[int, ...]


class WeightSource(ABC):
    """Weights of one model, memory-mapped: nothing is read before it is asked for.

    Names are those of ``ModelSpec.tensor_shapes``; both methods raise ``ModelError`` for any other.
    """

    @abstractmethod
    def dequantized(self, name: str) -> torch.Tensor:
        """The tensor as float32 on the CPU, in its own memory."""

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's quantised blocks; None where it is stored as what no blocks can hold."""


def open_weights(files: ModelFiles) -> WeightSource:
    """The weights of ``files``, which ``engine.models.registry.validate_model_files`` has accepted."""
    return _GGUFWeights(files.path) if files.format == "gguf" else _SafetensorsWeights(files.path)


class _GGUFWeights(WeightSource):
    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._spec = spec_from_gguf(self._file)
        self._places, self._shapes = stored_rows(self._spec, stacks_experts=True), self._spec.tensor_shapes()
        self._stored_names = gguf_tensor_names(self._spec)
        self._interleaves = family_of(self._spec.architecture).gguf_interleaves_rotary

    def dequantized(self, name: str) -> torch.Tensor:
        rows, kind = self._rows(name)
        values = gguf.quants.dequantize(rows, kind)
        if not values.flags.writeable:  # float32 as stored: still a view of the file
            values = values.copy()
        return torch.from_numpy(values.reshape(self._shapes[name]))

    def quantized(self, name: str) -> QuantizedTensor | None:
        rows, kind = self._rows(name)
        return None if kind in _FLOAT_TYPES else QuantizedTensor(lambda: rows, kind, self._shapes[name])

    def _rows(self, name: str) -> tuple[npt.NDArray[np.uint8], GGMLQuantizationType]:
        """The weight's bytes, one row of the matrix (or one element of a bias) a row."""
        if name not in self._places:
            raise ModelError(f"{self._file.path}: no tensor {name!r}")
        place = self._places[name]
        tensor = self._file.tensors[self._stored_names[place.tensor]]
        rows = self._file.data(tensor.name)
        if len(tensor.shape) > 1:
            rows = rows[place.rows]
        if self._interleaves and (".q_proj." in name or ".k_proj." in name):
            heads = self._spec.num_heads if ".q_proj." in name else self._spec.num_kv_heads
            rows = _uninterleave_rotary(rows, heads)
        return rows, tensor.type


def _uninterleave_rotary(rows: npt.NDArray[np.uint8], num_heads: int) -> npt.NDArray[np.uint8]:
    """Undo llama.cpp's order of q and k rows.

    Within a head it stores rotary pairs next to each other (0, D/2, 1, D/2 + 1, ...) for llama
    models; the Hugging Face order has the two halves one after the other. [H * D, ...] → the same.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class _SafetensorsWeights(WeightSource):
    """Of ``model*.safetensors`` in a directory. Pickled files are never opened."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        spec = read_spec(directory)
        self._quantization = read_quantization(directory)
        self._places, self._shapes = stored_rows(spec, stacks_experts=False), spec.tensor_shapes()
        self._norm_offset = family_of(spec.architecture).norm_offset
        files: list[Any] = [safe_open(path, framework="pt") for path in weight_files(directory)]
        self._stored = {plain_name(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118

    def dequantized(self, name: str) -> torch.Tensor:
        matrix = self._matrix(name)
        if matrix is not None:
            return torch.from_numpy(matrix.dequantized())
        place = self._place(name)
        tensor: torch.Tensor = self._slice(place.tensor)[place.rows].float()
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor

    def quantized(self, name: str) -> QuantizedTensor | None:
        matrix = self._matrix(name)
        kind = None if matrix is None else matrix.block_type
        return None if matrix is None or kind is None else QuantizedTensor(matrix.blocks, kind, self._shapes[name])

    def _matrix(self, name: str) -> QuantizedMatrix | None:
        """None where it is stored as floating-point numbers."""
        place, quantization = self._place(name), self._quantization
        module = None if quantization is None else quantization.module_of(place.tensor, place.shape, self._stored)
        if quantization is None or module is None:
            return None
        try:
            matrix = quantization.matrix(partial(self._part, module), *place.shape)
        except ModelError as error:
            raise ModelError(f"{self._directory}: {module}: {error}") from None
        return matrix.rows(place.rows)

    def _part(self, module: str, part: str) -> npt.NDArray[Any]:
        tensor: torch.Tensor = self._slice(f"{module}.{part}")[...]
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def _slice(self, name: str) -> Any:
        """A stored tensor, of which nothing is read before it is indexed."""
        if name not in self._stored:
            raise ModelError(f"{self._directory}: no tensor {name!r}")
        file, stored_name = self._stored[name]
        return file.get_slice(stored_name)

    def _place(self, name: str) -> StoredRows:
        if name not in self._places:
            raise ModelError(f"{self._directory}: no tensor {name!r}")
        return self._places[name]
