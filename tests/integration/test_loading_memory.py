"""A model that is loaded is in memory once: neither the file nor float32 numbers of it are there as well.

Random models of 170 MB, and quantised ones of 200 to 350, loaded in a process whose highest resident memory Linux
counts (``VmHWM``). The pages of a mapped file are part of it.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file

from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.native_decoder import NativeDecoder
from evospec.engine.models.quantization.known import quantization_of
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.safetensors_spec import read_config
from evospec.engine.models.stored_tensors import stored_shapes
from evospec.engine.models.weights import open_weights
from evospec.kernels import native
from evospec.kernels.native import Team
from tests.quantized_models import AWQ, FP8, GPTQ, change_config, compressed
from tests.tiny_models import make_directory, make_gguf

SHAPE = {
    "vocab_size": 16_384,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
MOST = 1.45
"""Times the weights as they are served. The file held as well would be 2.0, and float32 beside bfloat16 3.0."""
LARGE = SHAPE | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 6}
MOST_QUANTIZED = 1.1
QUANTIZED: dict[str, dict[str, Any]] = {
    "awq": AWQ,
    "gptq, 8 bits": GPTQ | {"bits": 8},
    "compressed-tensors": compressed("pack-quantized", num_bits=4, strategy="group", group_size=128),
    "fp8": FP8 | {"weight_block_size": [128, 128]},
}
FIXED = {"g_idx": 0, "qzeros": 0x7F7F7F7F}
"""Of GPTQ, the same everywhere: then its integers stay as they are"""
needs_kernels = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))


def resident(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def load(files: ModelFiles, backend: str) -> TorchDecoder | NativeDecoder:
    spec, source = validate_model_files(files), open_weights(files)
    if backend == "native":
        return NativeDecoder(source, spec, Team(1), 64)
    return load_model(source, spec, torch.bfloat16, torch.device("cpu"), 64)


def peak_for_each_byte(small: ModelFiles, files: ModelFiles, backend: str) -> float:
    """Memory that loading takes at most, over that of the weights; ``small`` is loaded first, to load all code."""
    load(small, backend)
    forget_peak()
    before = resident("VmRSS")
    model = load(files, backend)
    return (resident("VmHWM") - before) / model.weight_bytes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    made = {}
    for size, shape in (("small", SHAPE | {"vocab_size": 512, "num_hidden_layers": 1}), ("large", SHAPE)):
        directory = tmp_path_factory.mktemp(size) / "model"
        made[f"{size}, safetensors"] = make_directory(directory, "qwen3", dtype=torch.bfloat16, **shape)
        path = directory.parent / "model.gguf"
        made[f"{size}, gguf"] = make_gguf(path, directory, GGMLQuantizationType.Q8_0)
    return made


def make_quantized(directory: Path, config: dict[str, Any], **shape: Any) -> ModelFiles:
    """A checkpoint of any numbers."""
    files = make_directory(directory, "qwen3", dtype=torch.bfloat16, **(shape | {"num_hidden_layers": 1}))
    change_config(files, quantization_config=config, num_hidden_layers=shape["num_hidden_layers"])
    quantization, tensors = quantization_of({"quantization_config": config}), dict[str, torch.Tensor]()
    assert quantization is not None
    for name, size in stored_shapes(read_config(directory)[0], stacks_experts=False).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = torch.randn(size).bfloat16()
            continue
        for part, (types, of_part) in quantization.parts(*size).items():
            tensors[f"{name.removesuffix('weight')}{part}"] = any_numbers(types[0], of_part, FIXED.get(part)).clone()
    save_file(tensors, directory / "model.safetensors")
    any_numbers.cache_clear()
    return files


@cache
def any_numbers(stored: str, size: tuple[int, ...], fixed: int | None) -> torch.Tensor:
    """The same for every layer, as they take a while to draw."""
    if fixed is not None:
        return torch.full(size, fixed, dtype=torch.int32)
    if stored == "I32":
        return torch.randint(0, 2**31 - 1, size, dtype=torch.int32)
    return torch.rand(size).to({"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}[stored])


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModelFiles]]:
    """A small checkpoint and a large one of a kind; gone when another kind's turn comes."""
    directory = tmp_path_factory.mktemp("quantized")
    small = SHAPE | {"vocab_size": 512, "num_hidden_layers": 1}
    shapes = {"small": small, "large": LARGE}
    yield [make_quantized(directory / name, QUANTIZED[request.param], **shape) for name, shape in shapes.items()]
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("safetensors", "torch"),
        pytest.param("safetensors", "native", marks=needs_kernels),
        pytest.param("gguf", "native", marks=needs_kernels),
    ],
)
def test_a_model_is_in_memory_once(kind: str, backend: str, models: dict[str, ModelFiles], process: Pool) -> None:
    arguments = models[f"small, {kind}"], models[f"large, {kind}"], backend
    assert process.apply(peak_for_each_byte, arguments) < MOST


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_kernels)])
def test_so_is_a_quantized_one(quantized: list[ModelFiles], backend: str, process: Pool) -> None:
    assert process.apply(peak_for_each_byte, (*quantized, backend)) < MOST_QUANTIZED
