"""Where a model's weights come from: tensors by their Hugging Face name, as stored or as float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

from engine.models.config import ModelFiles


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix as a GGUF file stores it.

    ``blocks`` is uint8 [rows, bytes per row], read-only and usually memory-mapped; ``shape`` is
    (rows, columns) in weights. Rows follow the Hugging Face order (rotary halves, not interleaved).
    """

    blocks: npt.NDArray[np.uint8]
    type: GGMLQuantizationType
    shape: tuple[int, ...]


class WeightSource(ABC):
    """Weights of one model. Names are those of ``ModelSpec.tensor_shapes``."""

    @abstractmethod
    def dequantized(self, name: str) -> torch.Tensor:
        """The tensor as float32 on the CPU, in its own memory.

        Raises:
            ModelError: no such tensor.
        """

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's quantised blocks; None where it is stored as floating-point numbers.

        Raises:
            ModelError: no such tensor.
        """


def open_weights(files: ModelFiles) -> WeightSource:
    """The weights of ``files``, which ``engine.models.registry.validate_model_files`` has accepted."""
    if files.format == "gguf":
        from engine.models.gguf_weights import GGUFWeights

        return GGUFWeights(files.path)
    from engine.models.safetensors_weights import SafetensorsWeights

    return SafetensorsWeights(files.path)
