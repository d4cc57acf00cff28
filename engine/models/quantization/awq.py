"""AWQ, 4 bits (arXiv 2306.00978), in the layout of AutoAWQ's ``gemm`` version. Torch-free.

A matrix [n, k] has ``qweight`` int32 [k, n / 8], ``qzeros`` int32 [groups, n / 8] and ``scales`` [groups, n]. A word
holds eight codes next to each other along n; from the lowest bits on they are those of rows 0, 2, 4, 6, 1, 3, 5, 7.
Source: ``from_linear`` in https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.quantization.base import (
    FLOATS,
    Array,
    Groups,
    Part,
    Quantization,
    QuantizedMatrix,
    Read,
    num_words,
    read_once,
    supported,
)

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each row is"""


@dataclass(frozen=True)
class Awq(Quantization):
    groups: Groups
    scale: str = "scales"

    @classmethod
    def read(cls, config: ConfigKeys) -> Awq:
        layout = config.text("version", config.text("format", "gemm")).lower()
        supported("version", layout, ("gemm",))
        supported("backend", config.text("backend", "autoawq"), ("autoawq", "auto"))
        supported("bits", config.number("bits", int), (4,))
        return cls(Groups(config.number("group_size", int)))

    def parts(self, n: int, k: int) -> dict[str, Part]:
        groups = self.groups.count(k)
        return {
            "qweight": Part(("I32",), (k, num_words(n, 4))),
            "qzeros": Part(("I32",), (groups, num_words(n, 4))),
            "scales": Part(FLOATS, (groups, n)),
        }

    def matrix(self, read: Read, n: int, k: int) -> QuantizedMatrix:
        words = read_once(lambda: read("qweight"))
        return QuantizedMatrix(
            codes=lambda rows: _rows(words(), rows),
            bits=4,
            scales=read("scales").T,
            zeros=_rows(read("qzeros"), slice(0, n)),
            groups=self.groups.of(k),
        )


def _rows(words: Array, rows: slice) -> Array:
    """int32 [columns, n / 8] → codes [rows, columns]."""
    first = rows.start // 8
    words = np.ascontiguousarray(words[:, first : -(-rows.stop // 8)].T)
    codes = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for row, place in enumerate(_PLACES):
        codes[:, row] = words >> 4 * place & 15
    return codes.reshape(-1, words.shape[1])[rows.start - 8 * first : rows.stop - 8 * first]
