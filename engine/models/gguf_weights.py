"""Weights of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

from engine.models.config import ModelError
from engine.models.gguf_file import GGUFFile, GGUFTensor
from engine.models.gguf_spec import gguf_tensor_name, spec_from_gguf
from engine.models.weights import QuantizedTensor, WeightSource

_FLOAT_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


class GGUFWeights(WeightSource):
    """Memory-mapped; nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = GGUFFile(path)
        self._spec = spec_from_gguf(self._file)

    def dequantized(self, name: str) -> torch.Tensor:
        tensor = self._tensor(name)
        values = gguf.quants.dequantize(self._rows(name, tensor), tensor.type)
        if not values.flags.writeable:  # float32 as stored: still a view of the file
            values = values.copy()
        return torch.from_numpy(values.reshape(tensor.shape))

    def quantized(self, name: str) -> QuantizedTensor | None:
        tensor = self._tensor(name)
        if tensor.type in _FLOAT_TYPES:
            return None
        return QuantizedTensor(self._rows(name, tensor), tensor.type, tensor.shape)

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._spec.tensor_shapes():
            raise ModelError(f"{self._file.path}: no tensor {name!r}")
        return self._file.tensors[gguf_tensor_name(name)]

    def _rows(self, name: str, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, one row of the matrix (or one element of a bias) a row."""
        rows = self._file.data(tensor.name)
        if self._spec.architecture != "llama":
            return rows
        if ".q_proj." in name:
            return uninterleave_rotary(rows, self._spec.num_heads)
        if ".k_proj." in name:
            return uninterleave_rotary(rows, self._spec.num_kv_heads)
        return rows


def uninterleave_rotary(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's order of q and k rows.

    Within a head it stores rotary pairs next to each other (0, D/2, 1, D/2 + 1, ...) for llama
    models; the Hugging Face order has the two halves one after the other. [H * D, ...] → the same.
    """
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
