"""What engine and worker agree on of a draft that grows: its shape, and whose it is."""

from __future__ import annotations

import hashlib

from engine.models.config import ModelSpec
from engine.models.eagle3_config import Eagle3Config, recorded_layers
from engine.models.weights import WeightSource


def growing_config(spec: ModelSpec, target: str) -> Eagle3Config:
    """The shape that `evospec train-draft` gives a draft too: a layer as large as the target's."""
    return Eagle3Config.for_target(spec, target, recorded_layers(spec)[:-1], spec.intermediate_size)


def growing_fingerprint(source: WeightSource, spec: ModelSpec) -> str:
    """Names the target, by its shape and weights that any training of it changes: hexadecimal.

    What has grown for another model, a fine-tune of the same name included, is not taken over.
    """
    digest = hashlib.sha256(repr(spec).encode())
    for name in ("model.norm.weight", f"model.layers.{spec.num_layers - 1}.self_attn.o_proj.weight"):
        digest.update(source.dequantized(name).numpy().tobytes())
    return digest.hexdigest()
