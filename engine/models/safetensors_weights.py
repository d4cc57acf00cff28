"""Weights of a Hugging Face directory: ``model*.safetensors``. Pickled files are never opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.models.config import ModelError
from engine.models.safetensors_spec import weight_files
from engine.models.weights import QuantizedTensor, WeightSource


class SafetensorsWeights(WeightSource):
    """Memory-mapped; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        files: list[Any] = [safe_open(path, framework="pt") for path in weight_files(directory)]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

    def dequantized(self, name: str) -> torch.Tensor:
        if name not in self._file_of:
            raise ModelError(f"{self._directory}: no tensor {name!r}")
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor.float()

    def quantized(self, name: str) -> QuantizedTensor | None:
        if name not in self._file_of:
            raise ModelError(f"{self._directory}: no tensor {name!r}")
        return None
