"""``ModelSpec`` of a Hugging Face directory, checked against its safetensors headers. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.models.config import ModelError, ModelSpec
from engine.models.families.known import spec_from_config
from engine.models.stored_tensors import stored_shapes

SUPPORTED_DTYPES = ("F32", "F16", "BF16")
Header = dict[str, tuple[tuple[int, ...], str | None]]
"""Shape and type of tensors by name; the types as safetensors calls them."""


def spec_from_directory(directory: Path) -> ModelSpec:
    """``read_spec``, and a check that every tensor the model needs is there, in shape and whole.

    Raises:
        ModelError: unsupported architecture or feature; missing, corrupt or truncated file or tensor.
    """
    spec = read_spec(directory)
    _check_tensors(directory, spec)
    return spec


def read_spec(directory: Path) -> ModelSpec:
    """What ``config.json`` and ``generation_config.json`` (if there is one) say, or ``ModelError``."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    try:
        return spec_from_config(config, read_json(generation) if generation.exists() else {})
    except ModelError as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model, one or several."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{directory}: no model*.safetensors file (pickled weights are never loaded)")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ``ModelError``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def text_name(stored: str) -> str:
    """What a tensor is called in a model that reads text only, where its own model may read images too."""
    for prefix, replacement in (("model.language_model.", "model."), ("language_model.", "")):
        if stored.startswith(prefix):
            return replacement + stored.removeprefix(prefix)
    return stored


def read_header(path: Path) -> Header:
    """Shape and type of each tensor of a safetensors file; raises ``SafetensorError`` or ``OSError``."""
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _check_tensors(directory: Path, spec: ModelSpec) -> None:
    missing = stored_shapes(spec, stacks_experts=False)
    for path in weight_files(directory):
        try:
            header = read_header(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: corrupt or truncated: {error}") from error
        of_text = {text_name(name): info for name, info in header.items()}
        for name in missing.keys() & of_text.keys():
            (shape, dtype), wanted = of_text[name], missing.pop(name)
            if shape != wanted:
                raise ModelError(f"{path}: tensor {name!r} has the shape {shape}, must be {wanted}")
            if dtype not in SUPPORTED_DTYPES:
                raise ModelError(f"{path}: tensor {name!r} has the unsupported type {dtype}")
    if missing:
        raise ModelError(f"{directory}: tensor {min(missing)!r} is missing")
