"""Numbers of 8 bits that are stored one by one: FP8 (e4m3) and int8, times a grid of scales. Torch-free.

A matrix [n, k] has ``weight`` [n, k] and ``weight_scale``, which DeepSeek calls ``weight_scale_inv``: one scale for all
of it, or one for each block of rows and columns. What the configuration says of activations is not read. Sources:
transformers.integrations.finegrained_fp8, and compressed_tensors.compressors.naive_quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.quantization.base import FLOATS, Groups, Part, Quantization, QuantizedMatrix, Read, supported

INT8, FP8 = "I8", "F8_E4M3"
"""Types of tensors, as safetensors calls them"""


@dataclass(frozen=True)
class Scaled(Quantization):
    number_type: str
    rows: Groups
    """That have a scale in common"""
    columns: Groups
    scale: str = "weight_scale"

    @classmethod
    def read(cls, config: ConfigKeys) -> Scaled:
        supported("fmt", config.text("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
        return cls(FP8, *block(config, "weight_block_size"))

    def parts(self, n: int, k: int) -> dict[str, Part]:
        is_one = self.rows.size == self.columns.size == -1
        return {
            "weight": Part((self.number_type,), (n, k)),
            self.scale: Part(FLOATS, () if is_one else self._grid(n, k)),
        }

    def matrix(self, read: Read, n: int, k: int) -> QuantizedMatrix:
        scales = read(self.scale).reshape(self._grid(n, k))[self.rows.of(n)]
        is_integer = self.number_type == INT8
        return QuantizedMatrix(
            codes=lambda rows: read("weight", rows).view(np.uint8) ^ 128 if is_integer else read("weight", rows),
            bits=8 if is_integer else None,
            scales=scales,
            zeros=np.full(scales.shape, 128, np.uint8) if is_integer else None,
            groups=self.columns.of(k),
        )

    def _grid(self, n: int, k: int) -> tuple[int, int]:
        return self.rows.count(n), self.columns.count(k)


def block(config: ConfigKeys, key: str) -> tuple[Groups, Groups]:
    """Rows and columns of a block as a configuration says; all of them where it says nothing."""
    if not config.items(key, 2):
        return Groups(-1), Groups(-1)
    rows, columns = map(int, config.numbers(key)[:2])
    return Groups(rows), Groups(columns)
