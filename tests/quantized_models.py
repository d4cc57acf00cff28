"""Tiny quantised checkpoints, written as their producers write them, and the same models with dequantised weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from evospec.engine.models.config import ModelFiles
from tests.tiny_models import make_directory

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""What a matrix [n, k] is stored in, and what it is then, in float32."""
SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 192}
"""The compiled kernels want multiples of 32. Blocks of 128 x 128 are cut off at some edges."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Integers:
    """weight = scale * (code - zero), with the scale and zero of a column's group."""

    codes: torch.Tensor
    """[n, k], not negative"""
    group_scales: torch.Tensor
    """[n, groups]"""
    group_zeros: torch.Tensor
    group_of: torch.Tensor
    """Of each column"""

    @property
    def dequantized(self) -> torch.Tensor:
        return (self.codes - self.group_zeros[:, self.group_of]).float() * self.group_scales.float()[:, self.group_of]


def quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    """To the nearest code; ``group_size`` -1: a row is a group."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)) if act_order else torch.arange(k)
    group_of = torch.empty(k, dtype=torch.int32)
    group_of[order] = torch.arange(k, dtype=torch.int32) // size
    if not symmetric:
        weight = torch.cat((weight[:1].abs(), weight[1:]))  # a row whose zeros are 0
    grouped = weight[:, order].reshape(n, -1, size)
    if symmetric:
        scales = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(dtype)
        zeros = torch.full(scales.shape, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / (2**bits - 1)).to(dtype)
        zeros = (-low / scales.float()).round().long()
    codes = (weight / scales.float()[:, group_of]).round().long() + zeros[:, group_of]
    return Integers(codes.clamp(0, 2**bits - 1), scales, zeros, group_of)


def pack(values: torch.Tensor, bits: int, order: tuple[int, ...] | range | None = None) -> torch.Tensor:
    """Rows, 32 / bits of them in a word each, the first of ``order`` in its lowest bits: [m, x] → [m bits / 32, x]."""
    per_word = 32 // bits
    words = torch.zeros(len(values) // per_word, values.shape[1], dtype=torch.int64)
    for place, row in enumerate(order or range(per_word)):
        words |= values.long()[row::per_word] << (bits * place)
    return words.to(torch.int32)  # as C does it: the 32 lower bits


def gptq(bits: int, less_one: bool = True, **how: Any) -> Callable[[torch.Tensor], Stored]:
    def store(weight: torch.Tensor) -> Stored:
        integers = quantize(weight, bits, **how)
        zeros = pack(integers.group_zeros, bits).T
        parts = {
            "qweight": pack(integers.codes.T, bits),
            "qzeros": zeros - {4: 0x11111111, 8: 0x01010101}[bits] if less_one else zeros,
            "scales": integers.group_scales.T,
            "g_idx": integers.group_of,
        }
        return parts, integers.dequantized

    return store


def awq(weight: torch.Tensor) -> Stored:
    integers = quantize(weight, 4, group_size=64, symmetric=False)
    parts = {
        "qweight": pack(integers.codes, 4, AWQ_ORDER).T,
        "qzeros": pack(integers.group_zeros, 4, AWQ_ORDER).T,
        "scales": integers.group_scales.T,
    }
    return parts, integers.dequantized


def packed(bits: int, **how: Any) -> Callable[[torch.Tensor], Stored]:
    """Of compressed-tensors."""

    def store(weight: torch.Tensor) -> Stored:
        integers = quantize(weight, bits, dtype=torch.bfloat16, **how)
        parts = {
            "weight_packed": pack(integers.codes.T, bits).T,
            "weight_scale": integers.group_scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not how["symmetric"]:
            parts["weight_zero_point"] = pack(integers.group_zeros, bits)
        if how.get("act_order"):
            parts["weight_g_idx"] = integers.group_of
        return parts, integers.dequantized

    return store


def int8(weight: torch.Tensor) -> Stored:
    """Of compressed-tensors; its zeros are 128 here, and 0 there."""
    integers = quantize(weight, 8, group_size=-1, symmetric=True, dtype=torch.bfloat16)
    codes = (integers.codes - 128).to(torch.int8)
    return {"weight": codes, "weight_scale": integers.group_scales}, integers.dequantized


def fp8(rows: int | None, columns: int | None, scale_name: str, shape: tuple[int, ...] | None = None) -> Any:
    """Blocks of so many rows and columns, None: all, have one scale, which is stored in ``shape`` if it is given."""

    def store(weight: torch.Tensor) -> Stored:
        n, k = weight.shape
        blocks_down, blocks_across = -(-n // (rows or n)), -(-k // (columns or k))
        scales = torch.empty(blocks_down, blocks_across)
        codes, values = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
        for i in range(blocks_down):
            for j in range(blocks_across):
                block = (
                    slice(i * (rows or n), (i + 1) * (rows or n)),
                    slice(j * (columns or k), (j + 1) * (columns or k)),
                )
                scales[i, j] = weight[block].abs().max() / 448
                codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                values[block] = codes[block].float() * scales[i, j]
        return {"weight": codes, scale_name: scales if shape is None else scales.reshape(shape)}, values

    return store


def mxfp4(weight: torch.Tensor) -> Stored:
    """Of experts [experts, k, n], as gpt-oss stores them: the nearest number of 4 bits, times a power of two."""
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = torch.cat((numbers, -numbers))
    blocks = weight.mT.reshape(len(weight), weight.shape[2], -1, 32)
    exponents = blocks.abs().amax(-1).log2().floor() - 2
    scales = exponents.exp2()[..., None]
    codes = (blocks[..., None] / scales[..., None] - numbers).abs().argmin(-1)
    parts = {
        "blocks": (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8),
        "scales": (exponents + 127).to(torch.uint8),
    }
    return parts, (numbers[codes] * scales).flatten(-2).mT.contiguous()


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "actorder": None} | weights
    group = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


@dataclass(frozen=True)
class Way:
    """How a checkpoint is quantised: what config.json says of it, how a matrix is stored, and what the kernels get."""

    config: dict[str, Any]
    store: Callable[[torch.Tensor], Stored]
    block_type: GGMLQuantizationType | None
    """None: bf16"""
    family: str = "llama"
    model: tuple[tuple[str, Any], ...] = ()
    """Further entries of its config.json"""
    is_exact: bool = True
    """Whether blocks hold just these weights: their minima, scale times zero, have half precision"""
    weight: str = "self_attn.q_proj"
    """One that is quantised, of a layer"""
    stacked: bool = False
    """Whether all experts are one tensor, and nothing else is quantised"""

    def make(self, directory: Path) -> tuple[ModelFiles, ModelFiles]:
        """The checkpoint, and a model with its dequantised weights."""
        plain = make_directory(directory / "plain", self.family, **(SHAPE | dict(self.model)))
        made = make_directory(directory / "made", self.family, **(SHAPE | dict(self.model)))
        weights, parts = load_file(plain.path / "model.safetensors"), dict[str, torch.Tensor]()
        for name in list(weights):
            module = name.removesuffix(".weight")
            is_layers = module.endswith("_proj") and weights[name].dim() == (3 if self.stacked else 2)
            if is_layers or (module == "lm_head" and self.config.get("lm_head")):
                stored, weights[name] = self.store(weights[name])
                between = "_" if self.stacked else "."
                parts |= {f"{module}{between}{part}": tensor.contiguous() for part, tensor in stored.items()}
            else:
                parts[name] = weights[name]
        save_file(weights, plain.path / "model.safetensors", metadata={"format": "pt"})
        save_file(parts, made.path / "model.safetensors", metadata={"format": "pt"})
        change_config(made, quantization_config=self.config)
        return made, plain


def change_config(files: ModelFiles, **entries: Any) -> None:
    path = files.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
Q4, Q8 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
EXPERTS = (("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 64))
WAYS = {
    "awq": Way(AWQ, awq, Q4, is_exact=False),
    "awq, fused matrices": Way(AWQ, awq, Q4, "phi3", is_exact=False),
    "gptq": Way(GPTQ | {"lm_head": True}, gptq(4, group_size=64, symmetric=True), Q4),
    "gptq, experts": Way(GPTQ, gptq(4, group_size=64, symmetric=True), Q4, "qwen3_moe", EXPERTS),
    "gptq, asymmetric": Way(GPTQ | {"group_size": 32}, gptq(4, group_size=32, symmetric=False), Q4, is_exact=False),
    "gptq_v2, asymmetric": Way(
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
        gptq(4, less_one=False, group_size=-1, symmetric=False),
        Q4,
        is_exact=False,
    ),
    "gptq, act-order": Way(GPTQ | {"desc_act": True}, gptq(4, group_size=64, symmetric=False, act_order=True), None),
    "gptq, groups of 16": Way(GPTQ | {"group_size": 16}, gptq(4, group_size=16, symmetric=True), None),
    "gptq, 8 bits": Way(GPTQ | {"bits": 8}, gptq(8, group_size=64, symmetric=True), Q8),
    "gptq, 8 bits, asymmetric": Way(GPTQ | {"bits": 8}, gptq(8, group_size=64, symmetric=False), None),
    "compressed-tensors, int4": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
        packed(4, group_size=32, symmetric=True),
        Q4,
    ),
    "compressed-tensors, int4, asymmetric": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, symmetric=False, actorder="weight"),
        packed(4, group_size=64, symmetric=False),
        Q4,
        is_exact=False,
    ),
    "compressed-tensors, int4, act-order": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64, actorder="group"),
        packed(4, group_size=64, symmetric=True, act_order=True),
        None,
    ),
    "compressed-tensors, packed int8": Way(
        compressed("pack-quantized", strategy="channel"), packed(8, group_size=-1, symmetric=True), Q8
    ),
    "compressed-tensors, int8": Way(compressed("int-quantized", strategy="channel"), int8, Q8),
    "compressed-tensors, fp8": Way(
        compressed("float-quantized", type="float", strategy="channel"), fp8(1, None, "weight_scale"), None
    ),
    "fp8": Way(FP8 | {"activation_scheme": "static"}, fp8(None, None, "weight_scale", ()), None),
    "fp8, a list of one scale": Way(FP8, fp8(None, None, "weight_scale_inv", (1,)), None),
    "mxfp4": Way(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        mxfp4,
        GGMLQuantizationType.MXFP4,
        "gpt_oss",
        (("num_local_experts", 4), ("num_experts_per_tok", 2), ("hidden_size", 64)),
        weight="mlp.experts.1.up_proj",
        stacked=True,
    ),
    "fp8, blocks": Way(FP8 | {"weight_block_size": [128, 128]}, fp8(128, 128, "weight_scale_inv"), None),
}
