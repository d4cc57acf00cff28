"""MXFP4 (OCP Microscaling), as gpt-oss stores its experts: numbers of 4 bits, a power of two for each 32. Torch-free.

Several matrices [experts, n, k] have ``blocks`` uint8 [experts, n, k / 32, 16], whose bytes hold columns next to each
other, the first in the lower bits; and ``scales`` uint8 [experts, n, k / 32], exponents plus 127. Source:
``dequantize_convertops`` in transformers.integrations.mxfp4.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from evospec.engine.models.config import ModelError
from evospec.engine.models.quantization.base import Part, Quantization, Read

_BLOCK = 32


@dataclass(frozen=True)
class Mxfp4Matrix:
    read: Read
    block_type: GGMLQuantizationType = GGMLQuantizationType.MXFP4

    def blocks(self, rows: slice) -> npt.NDArray[np.uint8]:
        """GGUF's bytes hold a column and that 16 further on."""
        codes, scales = self.read("blocks", rows), self.read("scales", rows)
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*scales.shape, 2, _BLOCK // 2)
        packed = codes[..., 0, :] | codes[..., 1, :] << 4
        return np.concatenate((scales[..., None], packed), axis=-1).reshape(len(scales), -1)

    def dequantized(self, rows: slice) -> npt.NDArray[np.float32]:
        return gguf.quants.dequantize(self.blocks(rows), self.block_type)


@dataclass(frozen=True)
class Mxfp4(Quantization):
    scale: str = "scales"
    dimensions: int = 3

    def parts(self, n: int, k: int) -> dict[str, Part]:
        if k % _BLOCK:
            raise ModelError(f"not supported: MXFP4 with {k} columns, which is not a multiple of {_BLOCK}")
        numbers = (n, k // _BLOCK)
        return {"blocks": Part(("U8",), (*numbers, _BLOCK // 2)), self.scale: Part(("U8",), numbers)}

    def matrix(self, read: Read, n: int, k: int) -> Mxfp4Matrix:
        return Mxfp4Matrix(read)
