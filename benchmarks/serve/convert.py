"""Writes a bf16 safetensors copy of a GGUF file, so that peers which read no GGUF serve the same weights.

Runs in a peer's environment (it needs ``transformers``, ``accelerate`` and ``gguf``):
``python benchmarks/serve/convert.py MODEL.gguf OUTPUT_DIRECTORY``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, output: Path) -> None:
    """Dequantises ``gguf`` to float32, rounds to bfloat16 and writes a Hugging Face directory with its tokenizer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    config = model.config
    # save_pretrained refuses a model that came from a GGUF file, although its weights are plain tensors by now.
    del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)

    output.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.output)
