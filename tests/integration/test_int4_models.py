"""Checkpoints of 4 bits as a GPU keeps them: on a CPU, by the same operations of torch."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.projection import Int4Linear, Linear, Projection
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weight_reader import WeightReader
from evospec.engine.models.weights import open_weights
from evospec.engine.tensor_parallel.ranks import Ranks
from evospec.kernels.int4 import dequantized
from tests.kept_weights import LoneRank, projections
from tests.native_models import random_tokens
from tests.quantized_models import Q4, WAYS
from tests.reference_logits import CPU, logits_of
from tests.tiny_models import make_directory, make_gguf

OF_4_BITS = {name: way for name, way in WAYS.items() if way.block_type == Q4 and "experts" not in name}
BITS_A_WEIGHT = 5


def load(
    files: ModelFiles, kept: bool, ranks: Ranks | None = None, dtype: torch.dtype = torch.bfloat16
) -> TorchDecoder:
    spec = validate_model_files(files)
    return load_model(open_weights(files), spec, dtype, CPU, ranks=ranks, multiplies_int4=kept)


def compare(kept: Projection, expanded: Projection, is_exact: bool) -> int:
    """Returns how many bytes less the first takes.

    Where its minima are rounded, by 0.0074 of a scale, a sixteenth of the largest weight, a weight may be rounded to
    the next bfloat16, too.
    """
    assert isinstance(kept, Int4Linear)
    assert isinstance(expanded, Linear)
    weight = dequantized(kept.codes, kept.scales, torch.bfloat16)
    atol = 0.0 if is_exact else 2**-7 * float(expanded.weight.abs().max())
    torch.testing.assert_close(weight, expanded.weight, atol=atol, rtol=0)
    torch.testing.assert_close(kept.bias, expanded.bias, atol=0.0, rtol=0)
    assert kept.codes.nbytes + kept.scales.nbytes == weight.numel() * BITS_A_WEIGHT / 8
    return weight.nbytes - kept.codes.nbytes - kept.scales.nbytes


def check(files: ModelFiles, is_exact: bool) -> None:
    kept, expanded = load(files, True), load(files, False)
    saved = [compare(*pair, is_exact) for pair in zip(projections(kept), projections(expanded), strict=True)]
    assert expanded.weight_bytes - kept.weight_bytes == sum(saved)
    assert kept.lm_head.dtype == kept.embed_tokens.dtype == torch.bfloat16
    for rank in range(2):
        ours, whole = (projections(load(files, is_kept, LoneRank(rank))) for is_kept in (True, False))
        for pair in zip(ours, whole, strict=True):
            compare(*pair, is_exact)


@pytest.mark.parametrize("way", OF_4_BITS)
def test_weights_stay_as_they_are(way: str, tmp_path: Path) -> None:
    """Also those of one of two ranks: rows of the first product of attention and MLP, columns of the second."""
    check(OF_4_BITS[way].make(tmp_path)[0], OF_4_BITS[way].is_exact)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_so_do_ggufs(family: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """With biases, and with rows that are stored in another order."""
    directory = make_directory(tmp_path / "model", family)
    check(make_gguf(tmp_path / "model.gguf", directory.path, kind), is_exact=True)


@pytest.mark.parametrize("num_tokens", [20, 100])
def test_answers_are_those_of_expanded_weights(num_tokens: int, tmp_path: Path) -> None:
    files, _ = WAYS["gptq"].make(tmp_path)
    kept, expanded = (load(files, is_kept, dtype=torch.float32) for is_kept in (True, False))
    token_ids = random_tokens(num_tokens)
    torch.testing.assert_close(logits_of(kept, token_ids), logits_of(expanded, token_ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["gptq, act-order", "gptq, groups of 16", "gptq, 8 bits", "fp8"])
def test_others_are_expanded(way: str, tmp_path: Path) -> None:
    files, _ = WAYS[way].make(tmp_path)
    assert {type(each) for each in projections(load(files, True))} == {Linear}


def test_blocks_are_not_cut(tmp_path: Path) -> None:
    """A quarter of 192 columns is a block and a half."""
    files, _ = WAYS["gptq"].make(tmp_path)
    shapes = validate_model_files(files).tensor_shapes()
    of_rank = (torch.bfloat16, CPU, LoneRank(1, 4))
    reader = WeightReader(open_weights(files), shapes, *of_rank, multiplies_fp8=True, multiplies_int4=True)
    layer = "model.layers.0."
    kinds = [
        type(reader.linear_of_sum(layer + "mlp.down_proj")),
        type(reader.linear_of_sum(layer + "self_attn.o_proj")),
        type(reader.linear(layer + "mlp.gate_proj", layer + "mlp.up_proj")),
    ]
    assert kinds == [Linear, Int4Linear, Int4Linear]


def test_experts_stay_too(tmp_path: Path) -> None:
    files, _ = WAYS["gptq, experts"].make(tmp_path)
    kept, expanded = load(files, True), load(files, False)
    experts = [mlp for layer in kept.layers for mlp in getattr(layer.mlp, "experts", ())]
    assert experts
    found = chain.from_iterable((mlp.gate_up_proj, mlp.down_proj) for mlp in experts)
    assert {type(each) for each in found} == {Int4Linear}
    assert kept.weight_bytes < expanded.weight_bytes / 2
