"""Decoding from quantised safetensors against the nearest GGUF type: ``python -m benchmarks.quantized_formats``.

Six layers of Qwen3-0.6B's shape with random weights are written in each format, in a directory that goes away again.
Engines without drafts take turns, step by step. Printed: milliseconds a step, and the ratio to GGUF's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from benchmarks.common.in_process import Engine, Turn, engine_config, take_turns
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from tests.quantized_models import WAYS, Way
from tests.tiny_models import make_directory, make_gguf

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
BITS_4, BITS_8 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0
"""Q4_1 has a minimum for each block of 32, as all 4-bit weights of safetensors have one."""
FORMATS = {
    "awq": BITS_4,
    "gptq": BITS_4,
    "gptq, asymmetric": BITS_4,
    "compressed-tensors, int4": BITS_4,
    "gptq, 8 bits": BITS_8,
    "compressed-tensors, packed int8": BITS_8,
    "compressed-tensors, int8": BITS_8,
}
"""By their names in ``WAYS``: the GGUF type of as many bits"""
PROMPT = list(range(3, 35))


def checkpoint(way: Way, directory: Path) -> ModelFiles:
    made, _ = replace(way, family="qwen3", model=tuple(SHAPE.items())).make(directory)
    return made


def gguf_of(kind: GGMLQuantizationType, directory: Path) -> ModelFiles:
    plain = make_directory(directory / "plain", "qwen3", **SHAPE)
    return make_gguf(directory / "model.gguf", plain.path, kind)


def step_times(engines: dict[str, Engine], concurrency: int, num_tokens: int) -> dict[str, float]:
    """Median seconds of a step in which each of so many sequences gets a token."""
    sampling = SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0, ignore_eos=True)
    turns = [Turn(PROMPT)] * concurrency
    results = take_turns([engine.answering(turns, sampling, concurrency) for engine in engines.values()])
    return {
        name: median(step.forward for step in result.decode_steps)
        for name, result in zip(engines, results, strict=True)
    }


def main(
    concurrency: Annotated[list[int] | None, typer.Option(help="Sequences at a time; default: 1 and 8.")] = None,
    num_tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 200,
) -> None:
    """Measures all formats beside their GGUF types."""
    table = Table("format", "GGUF", "sequences", "ms", "GGUF's ms", "ratio")
    with TemporaryDirectory() as directory:
        made = {name: checkpoint(WAYS[name], Path(directory) / str(n)) for n, name in enumerate(FORMATS)}
        types = {kind.name: gguf_of(kind, Path(directory) / kind.name) for kind in dict.fromkeys(FORMATS.values())}
        engines = {
            name: Engine(engine_config(str(files.path), SpeculationConfig(num_speculative_tokens=0, method="none")))
            for name, files in (made | types).items()
        }
        for count in concurrency or [1, 8]:
            with torch.inference_mode():
                seconds = step_times(engines, count, num_tokens)
            for name, kind in FORMATS.items():
                ours, theirs = 1e3 * seconds[name], 1e3 * seconds[kind.name]
                table.add_row(name, kind.name, str(count), f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
