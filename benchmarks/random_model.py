"""A model without real weights against llama.cpp: ``python -m benchmarks.random_model``, at most two minutes.

A GGUF file of Qwen3-0.6B's shape with random weights and Qwen2.5's tokens is written once, of up to 640 MB, into
``~/.cache/evospec/peers/models``. EvoSpec without drafts, which find nothing in such a text, and llama.cpp serve it in
turn. Printed: tokens a second of one stream and of eight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import typer
import uvloop
from gguf import GGMLQuantizationType

from benchmarks.common.process import Launch, running
from benchmarks.prompts.build import read_eval
from benchmarks.serve.peers import PEERS, SIDES, gguf_path
from evospec.engine.models.families.known import spec_from_config
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.gguf_spec import gguf_tensor_names
from evospec.server.bench.load import LoadOptions, run_load
from tests.tiny_models import add_shape

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SIDES_HERE = ("evospec", "llama.cpp")
CONCURRENCIES = (1, 8)
MAX_TOKENS = 48
SCALES = {GGMLQuantizationType.Q8_0: 0.0003, GGMLQuantizationType.Q4_0: 0.004}
"""With which random codes make weights of usual size"""


def random_model(kind: GGMLQuantizationType) -> Path:
    """The file with all matrices in this type, written at need."""
    path = PEERS / "models" / f"random-qwen3-0.6b-{kind.name.lower()}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = spec_from_config(CONFIG, {})
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "qwen3")
    add_shape(writer, spec)
    writer.add_rope_freq_base(spec.rope.theta)
    _add_tokenizer(writer, GGUFFile(gguf_path("qwen2.5-coder-0.5b")))
    generator, names = np.random.default_rng(0), gguf_tensor_names(spec)
    for name, shape in spec.tensor_shapes().items():
        if len(shape) == 1:
            writer.add_tensor(names[name], np.ones(shape, np.float32))
        else:
            writer.add_tensor(names[name], _random_blocks(kind, shape, generator), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").rename(path)
    return path


def _random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // values, size), np.uint8)
    blocks[..., :2] = np.array([SCALES[kind]], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _add_tokenizer(writer: gguf.GGUFWriter, file: GGUFFile) -> None:
    """That of another file, whose vocabulary is of the same size."""
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            writer.add_uint32(key, value)


def launch(side: str, model: Path, concurrency: int, port: int) -> Launch:
    started = SIDES[side].launch(str(model), concurrency, port)
    options = ["--engine.speculation.method", "none"] if side == "evospec" else []
    return Launch([*started.command, *options], started.environment, started.directory)


def tokens_per_second(side: str, model: Path, concurrency: int) -> float:
    """Of so many streams at once, without their prompts being known to the server."""
    prompts = [prompt.messages for prompt in read_eval()]
    name = f"random-model-{side}-{concurrency}"
    with running(lambda port: launch(side, model, concurrency, port), name) as (url, _):
        options = LoadOptions(
            url=url,
            model=model.stem,
            concurrency=concurrency,
            num_requests=concurrency * 2,
            max_tokens=MAX_TOKENS,
            warmup_requests=concurrency,
            max_seconds=15,
        )
        report, _ = uvloop.run(run_load(options, prompts))
    if report.errors:
        raise RuntimeError(f"{side}: {report.error_messages}")
    return report.tokens_per_second


def main(
    kind: Annotated[str, typer.Option(help=f"Of all matrices: {', '.join(kind.name for kind in SCALES)}.")] = "Q8_0",
) -> None:
    """Measures both sides at both concurrencies, and prints the ratio."""
    model = random_model(GGMLQuantizationType[kind])
    print(f"{model.name}, load average {os.getloadavg()[0]:.1f}")
    for concurrency in CONCURRENCIES:
        ours, theirs = (tokens_per_second(side, model, concurrency) for side in SIDES_HERE)
        print(f"{concurrency} at once: evospec {ours:.1f} tok/s, llama.cpp {theirs:.1f}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    typer.run(main)
