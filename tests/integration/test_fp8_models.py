"""FP8 checkpoints as a GPU multiplies them: on a CPU, by the same operations of torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.mlp import Mlp
from evospec.engine.models.projection import Fp8Linear, Linear, Projection
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.tensor_parallel.ranks import Ranks
from evospec.kernels.fp8 import quantize_rows
from tests.kept_weights import LoneRank, projections
from tests.native_models import random_tokens
from tests.quantized_models import WAYS
from tests.reference_logits import CPU, logits_of

BY_ROW = ("fp8", "fp8, a list of one scale", "compressed-tensors, fp8")


def load(files: ModelFiles, multiplies_fp8: bool, ranks: Ranks | None = None) -> TorchDecoder:
    spec = validate_model_files(files)
    return load_model(open_weights(files), spec, torch.bfloat16, CPU, ranks=ranks, multiplies_fp8=multiplies_fp8)


def values(projection: Projection) -> torch.Tensor:
    if isinstance(projection, Fp8Linear):
        return (projection.weight.float() * projection.scales[:, None]).bfloat16()
    assert isinstance(projection, Linear)
    return projection.weight


class Rounding:
    """Rounds activations to FP8, and multiplies in float32."""

    def __init__(self, projection: Projection) -> None:
        assert isinstance(projection, Fp8Linear)
        self._weight = projection.weight.float() * projection.scales[:, None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = quantize_rows(x)
        return F.linear(codes.float() * scales, self._weight).to(x.dtype)


@pytest.mark.parametrize("way", BY_ROW)
def test_weights_stay_as_they_are(way: str, tmp_path: Path) -> None:
    files, _ = WAYS[way].make(tmp_path)
    model, dequantized = load(files, multiplies_fp8=True), load(files, multiplies_fp8=False)
    size = 0
    for ours, expected in zip(projections(model), projections(dequantized), strict=True):
        assert isinstance(ours, Fp8Linear)
        assert torch.equal(values(ours), values(expected))
        size += ours.weight.numel() - 4 * len(ours.scales)
    assert model.weight_bytes == dequantized.weight_bytes - size


def test_answers_are_those_of_rounded_activations(tmp_path: Path) -> None:
    """Which are far nearer than those of activations as they are. Sums may be rounded otherwise."""
    files, _ = WAYS["compressed-tensors, fp8"].make(tmp_path)
    model, token_ids = load(files, multiplies_fp8=True), random_tokens(100)
    layers = []
    for layer in model.layers:
        assert isinstance(layer.mlp, Mlp)
        mlp = replace(layer.mlp, gate_up_proj=Rounding(layer.mlp.gate_up_proj), down_proj=Rounding(layer.mlp.down_proj))
        layers.append(replace(layer, qkv_proj=Rounding(layer.qkv_proj), o_proj=Rounding(layer.o_proj), mlp=mlp))
    logits, expected = logits_of(model, token_ids), logits_of(replace(model, layers=layers), token_ids)
    error, rounding = (
        (logits - other).pow(2).mean().sqrt() for other in (expected, logits_of(load(files, False), token_ids))
    )
    assert error < rounding / 4


def test_blocks_of_columns_become_bfloat16(tmp_path: Path) -> None:
    """Matrices of 128 columns have one block of them."""
    files, _ = WAYS["fp8, blocks"].make(tmp_path)
    kinds = [type(each) for each in projections(load(files, multiplies_fp8=True))]
    assert kinds == [Fp8Linear, Linear, Fp8Linear, Linear] * (len(kinds) // 4)


def test_ranks_have_parts_of_them(tmp_path: Path) -> None:
    """Rows of the first product of attention and MLP, columns of the second."""
    files, _ = WAYS["compressed-tensors, fp8"].make(tmp_path)
    parts = [projections(load(files, True, LoneRank(rank))) for rank in range(2)]
    whole = [projections(load(files, False, LoneRank(rank))) for rank in range(2)]
    for ours, expected in zip(chain(*parts), chain(*whole), strict=True):
        assert isinstance(ours, Fp8Linear)
        assert torch.equal(values(ours), values(expected))
