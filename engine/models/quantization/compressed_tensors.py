"""compressed-tensors, as llm-compressor makes them: int4, int8 and FP8. Torch-free.

Where the format is ``pack-quantized``, a matrix [n, k] has ``weight_packed`` int32 [n, k * bits / 32], whose words hold
columns next to each other, the lowest bits first; ``weight_scale`` [n, groups]; where it is not symmetric
``weight_zero_point`` int32 [n * bits / 32, groups], packed along n; and with act-order of groups ``weight_g_idx`` [k],
the group of each column. Codes and zeros are signed numbers plus half of their range, which cancels out. In the other
formats numbers of 8 bits are stored as they are. Source: ``compress_weight`` and ``pack_to_int32`` in
https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evospec.engine.models.config import ModelError
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
    supported,
    unpacked,
)
from evospec.engine.models.quantization.scaled import FP8, INT8, Scaled, block

_BITS_OF_FORMAT = {"pack-quantized": (4, 8), "int-quantized": (8,), "float-quantized": (8,), "naive-quantized": (8,)}
_TYPES = {"int": INT8, "float": FP8}


@dataclass(frozen=True)
class PackQuantized(Quantization):
    bits: int
    groups: Groups
    is_symmetric: bool
    has_act_order: bool
    scale: str = "weight_scale"

    def parts(self, n: int, k: int) -> dict[str, Part]:
        groups = self.groups.count(k)
        parts = {"weight_packed": Part(("I32",), (n, num_words(k, self.bits))), self.scale: Part(FLOATS, (n, groups))}
        if not self.is_symmetric:
            parts["weight_zero_point"] = Part(("I32",), (num_words(n, self.bits), groups))
        if self.has_act_order:
            parts["weight_g_idx"] = Part(("I32", "I64"), (k,))
        return parts

    def matrix(self, read: Read, n: int, k: int) -> QuantizedMatrix:
        scales = read(self.scale)
        if self.is_symmetric:
            zeros = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        else:
            zeros = unpacked(read("weight_zero_point").T, self.bits, n).T
        groups = self.groups.of(k)
        if self.has_act_order:
            groups = checked_groups(read("weight_g_idx"), scales.shape[1])
        return QuantizedMatrix(
            codes=lambda rows: unpacked(read("weight_packed", rows), self.bits, k),
            bits=self.bits,
            scales=scales,
            zeros=zeros,
            groups=groups,
        )


def read_compressed_tensors(config: ConfigKeys) -> Quantization:
    config.refuse("transform_config")
    supported("sparsity_config.format", config.section("sparsity_config").text("format", "dense"), ("dense",))
    groups = config.section("config_groups")
    ways = {_read_group(groups.section(name), config.text("format", "")) for name in groups.values}
    if len(ways) != 1:
        raise ModelError(f"not supported: config_groups that store weights in {len(ways)} ways")
    return ways.pop()


def _read_group(group: ConfigKeys, layout: str) -> Quantization:
    layout = supported("format", group.text("format", layout), tuple(_BITS_OF_FORMAT))
    weights = group.section("weights")
    if not weights.values:
        raise ModelError("not supported: config_groups without weights")
    bits = supported("num_bits", weights.number("num_bits", int), _BITS_OF_FORMAT[layout])
    is_symmetric, strategy = weights.flag("symmetric", True), weights.text("strategy", "")
    if layout == "pack-quantized":
        supported("type", weights.text("type", "int"), ("int",))
        supported("strategy", strategy, ("group", "channel"))
        order = supported("actorder", weights.text("actorder", "weight"), ("weight", "static", "group", "dynamic"))
        size = weights.number("group_size", int) if strategy == "group" else -1
        return PackQuantized(bits, Groups(size), is_symmetric, has_act_order=order in ("group", "dynamic"))
    if not is_symmetric:
        raise ModelError(f"not supported: symmetric = False with format = {layout!r}")
    supported("strategy", strategy, ("tensor", "channel", "block"))
    number_type = _TYPES[supported("type", weights.text("type", "int"), tuple(_TYPES))]
    if strategy == "block":
        return Scaled(number_type, *block(weights, "block_structure"))
    return Scaled(number_type, rows=Groups(-1 if strategy == "tensor" else 1), columns=Groups(-1))
