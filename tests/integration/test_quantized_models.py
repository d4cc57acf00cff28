"""Quantised safetensors of every kind against the same model with its dequantised weights.

Weights are equal, number for number; logits are within 3e-5 of those of ``transformers`` in float32, and 32 tokens of
greedy text with a random EAGLE-3 draft are the same. The compiled kernels, which multiply integers as they are, are no
further from float32 than torch in bfloat16.
"""

from __future__ import annotations

import contextlib
import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelError
from evospec.engine.models.quantization.base import Array, read_once
from evospec.engine.models.quantization.known import quantization_of
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import ALL, open_weights
from evospec.kernels import native
from evospec.kernels.native import Team
from tests.any_json import JSON
from tests.native_models import check_model, random_tokens
from tests.quantized_models import AWQ, FP8, GPTQ, WAYS, Way, compressed
from tests.reference_logits import check_greedy, load, logits_of, transformers_model
from tests.tiny_drafts import Engine, Setting, with_draft

NUM_TOKENS = 32
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
def test_answers_are_those_of_the_dequantized_model(way: Way, tmp_path: Path) -> None:
    made, plain = way.make(tmp_path)
    ours, expected, reference = open_weights(made), open_weights(plain), transformers_model(plain)
    for name in validate_model_files(made).tensor_shapes():
        assert torch.equal(ours.dequantized(name), expected.dequantized(name)), name
    with torch.inference_mode():
        logits = reference(torch.tensor([random_tokens(100)])).logits[0]
    torch.testing.assert_close(logits_of(load(made), random_tokens(100)), logits, atol=3e-5, rtol=0)
    prompts = [random_tokens(40), random_tokens(50)[43:]]
    engine = Engine(made, Setting(), with_draft(made, tmp_path / "draft"))
    sampling = [SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)] * len(prompts)
    outputs = engine.generate(prompts, sampling)
    check_greedy(reference, prompts, outputs, NUM_TOKENS)
    assert engine.num_drafted > 0


@every_way
def test_kernels_get_the_integers_themselves(way: Way, tmp_path: Path) -> None:
    """With scales and minima of half precision: a minimum is at most 15 scales, and off by 2^-11 of itself."""
    made, _ = way.make(tmp_path)
    source, name = open_weights(made), f"model.layers.1.{way.weight}.weight"
    quantized, exact = source.quantized(name), source.dequantized(name)
    assert (None if quantized is None else quantized.type) == way.block_type
    if quantized is not None:
        values = torch.from_numpy(dequantize(quantized.blocks(ALL), quantized.type))
        largest_scale = float(exact.abs().max()) / 7
        torch.testing.assert_close(values, exact, atol=0 if way.is_exact else 15 * 2**-11 * largest_scale, rtol=0)


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
@every_way
def test_compiled_kernels_are_as_near_as_torch(way: Way, tmp_path: Path) -> None:
    made, _ = way.make(tmp_path)
    check_model(made, random_tokens(100), [Team(2)])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method = 'bitsandbytes' (supported: awq, "),
        ({"quant_method": "nvfp4"}, "quant_method = 'nvfp4'"),
        ({"bits": 4}, "quant_method = ''"),
        (GPTQ | {"bits": 3}, "bits = 3 (supported: 4, 8)"),
        (GPTQ | {"bits": 2}, "bits = 2"),
        (GPTQ | {"bits": "4"}, "bits is '4', must be of type int"),
        (GPTQ | {"group_size": 0}, "not supported: groups of 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' (supported: gptq, gptq_v2)"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format = True"),
        (AWQ | {"bits": 8}, "bits = 8 (supported: 4)"),
        (AWQ | {"version": "gemv"}, "version = 'gemv' (supported: gemm)"),
        (AWQ | {"backend": "llm-awq"}, "backend = 'llm-awq'"),
        (FP8 | {"fmt": "e5m2"}, "fmt = 'e5m2'"),
        (FP8 | {"weight_block_size": [128, 0]}, "not supported: groups of 0"),
        (compressed("marlin-24", num_bits=4, strategy="group"), "format = 'marlin-24'"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "format = 'nvfp4-pack-quantized'"),
        (compressed("pack-quantized", num_bits=2, strategy="channel"), "num_bits = 2 (supported: 4, 8)"),
        (compressed("pack-quantized", num_bits=4, strategy="tensor"), "strategy = 'tensor'"),
        (compressed("pack-quantized", num_bits=4, strategy="group", group_size=0), "groups of 0"),
        (compressed("int-quantized", strategy="channel", symmetric=False), "symmetric = False"),
        (compressed("int-quantized", strategy="channel") | {"config_groups": {}}, "store weights in 0 ways"),
        (compressed("int-quantized") | {"config_groups": {"a": {"weights": None}}}, "config_groups without weights"),
        (
            compressed("int-quantized") | {"sparsity_config": {"format": "sparse-24"}},
            "sparsity_config.format = 'sparse",
        ),
        (compressed("int-quantized") | {"transform_config": {"R1": {}}}, "transform_config"),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], reason: str) -> None:
    for whole in ({"quantization_config": config}, {"text_config": {"quantization_config": config}}):
        with pytest.raises(ModelError) as refused:
            quantization_of(whole)
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("way", "part", "stored", "reason"),
    [
        ("gptq", "g_idx", None, "o_proj.g_idx' is missing"),
        (
            "gptq",
            "qzeros",
            torch.zeros(2, 32, dtype=torch.int32),
            "o_proj.qzeros' has the shape (2, 32), must be (4, 16)",
        ),
        ("awq", "scales", torch.zeros(4, 128, dtype=torch.float64), "o_proj.scales' has the unsupported type F64"),
        (
            "fp8",
            "weight",
            torch.zeros(128, 256).to(torch.float8_e5m2),
            "o_proj.weight' has the unsupported type F8_E5M2",
        ),
        ("fp8", "weight_scale", None, "o_proj.weight' has the unsupported type F8_E4M3"),
        ("compressed-tensors, int8", "weight_scale", torch.ones(1, 128), "must be (128, 1)"),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    way: str, part: str, stored: torch.Tensor | None, reason: str, tmp_path: Path
) -> None:
    files, _ = WAYS[way].make(tmp_path)
    path, name = files.path / "model.safetensors", f"model.layers.1.self_attn.o_proj.{part}"
    rest = {key: tensor for key, tensor in load_file(path).items() if key != name}
    save_file(rest if stored is None else rest | {name: stored}, path)
    with pytest.raises(ModelError) as refused:
        validate_model_files(files)
    assert reason in str(refused.value)


def test_columns_of_no_group_are_refused(tmp_path: Path) -> None:
    files, _ = WAYS["gptq"].make(tmp_path)
    path, name = files.path / "model.safetensors", "model.layers.1.self_attn.o_proj.g_idx"
    save_file(load_file(path) | {name: torch.full((256,), 4, dtype=torch.int32)}, path)
    with pytest.raises(ModelError, match=r"o_proj: a column is in group 4 of 4"):
        open_weights(files).dequantized("model.layers.1.self_attn.o_proj.weight")


@given(data=st.data())
def test_whatever_a_configuration_says_is_read_or_refused(data: st.DataObject) -> None:
    """One entry of it is anything at all."""
    config = copy.deepcopy(data.draw(st.sampled_from([way.config for way in WAYS.values()])))
    weights = config["config_groups"]["group_0"]["weights"] if "config_groups" in config else config
    part = data.draw(st.sampled_from([config, weights]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON)
    with contextlib.suppress(ModelError):
        quantization = quantization_of({"quantization_config": config})
        assert quantization is None or quantization.parts(64, 128)


def test_threads_that_pack_a_matrix_read_it_once() -> None:
    """Else each has the whole matrix in memory at the same time."""
    reads: list[int] = []

    def read() -> Array:
        reads.append(1)
        time.sleep(0.05)
        return np.zeros(3)

    of_first = read_once(read)
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda _: of_first(), range(4)))
    assert len(reads) == 1
    assert all(array is arrays[0] for array in arrays)
