"""GPTQ, 4 and 8 bits (arXiv 2210.17323), as AutoGPTQ and GPTQModel store it. Torch-free.

A matrix [n, k] has ``qweight`` int32 [k * bits / 32, n], whose words hold rows next to each other, the lowest bits
first; ``scales`` [groups, n]; ``qzeros`` int32 [groups, n * bits / 32], packed along n; and ``g_idx`` int32 [k], the
group of each column: with act-order (``desc_act``) those of a group are anywhere. Zeros are stored less one, with the
borrow going through the whole word; in the format ``gptq_v2`` they are stored as they are. Source: ``pack`` and
``convert_gptq_v1_to_v2_format`` in https://github.com/ModelCloud/GPTQModel.
"""

from __future__ import annotations

from dataclasses import dataclass

from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.quantization.base import (
    FLOATS,
    Groups,
    Part,
    Quantization,
    QuantizedMatrix,
    Read,
    checked_groups,
    num_words,
    read_once,
    supported,
    unpacked,
)

_A_ONE_IN_EACH = {4: 0x11111111, 8: 0x01010101}
"""Code of a word, by their bits"""


@dataclass(frozen=True)
class Gptq(Quantization):
    bits: int
    groups: Groups
    has_zeros_less_one: bool
    scale: str = "scales"

    @classmethod
    def read(cls, config: ConfigKeys) -> Gptq:
        config.refuse("is_marlin_format", "adapter", "rotation")
        layout = config.text("checkpoint_format", config.text("format", "gptq"))
        return cls(
            supported("bits", config.number("bits", int), (4, 8)),
            Groups(config.number("group_size", int)),
            supported("checkpoint_format", layout, ("gptq", "gptq_v2")) == "gptq",
        )

    def parts(self, n: int, k: int) -> dict[str, Part]:
        groups = self.groups.count(k)
        return {
            "qweight": Part(("I32",), (num_words(k, self.bits), n)),
            "qzeros": Part(("I32",), (groups, num_words(n, self.bits))),
            "scales": Part(FLOATS, (groups, n)),
            "g_idx": Part(("I32",), (k,)),
        }

    def matrix(self, read: Read, n: int, k: int) -> QuantizedMatrix:
        words, scales, zeros = read_once(lambda: read("qweight")), read("scales").T, read("qzeros")
        if self.has_zeros_less_one:
            zeros = zeros + _A_ONE_IN_EACH[self.bits]
        return QuantizedMatrix(
            codes=lambda rows: unpacked(words().T[rows], self.bits, k),
            bits=self.bits,
            scales=scales,
            zeros=unpacked(zeros, self.bits, n).T,
            groups=checked_groups(read("g_idx"), scales.shape[1]),
        )
