"""``ModelSpec`` of a Hugging Face directory, checked against its safetensors headers. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.families.base import Family
from evospec.engine.models.families.known import family_of, spec_from_config
from evospec.engine.models.quantization.base import FLOATS, Part, Quantization
from evospec.engine.models.quantization.known import quantization_of
from evospec.engine.models.stored_tensors import stored_shapes

_MAX_DEPTH = 100
"""Of a JSON file: what Python can parse may still be too deep to be shown in a message."""
Header = dict[str, tuple[tuple[int, ...], str | None]]
"""Shape and type of tensors by name; the types as safetensors calls them."""


def spec_from_directory(directory: Path) -> ModelSpec:
    """The ``ModelSpec`` of a directory, and a check that every tensor the model needs is there, in shape and whole.

    Raises:
        ModelError: unsupported architecture or feature; missing, corrupt or truncated file or tensor.
    """
    spec, quantization = read_config(directory)
    checked_tensors(directory, spec, quantization)
    return spec


def read_config(directory: Path) -> tuple[ModelSpec, Quantization | None]:
    """What ``config.json`` and ``generation_config.json`` (if there is one) say, or ``ModelError``."""
    generation = directory / "generation_config.json"
    with config_file(directory / "config.json") as config:
        spec = spec_from_config(config, read_json(generation) if generation.exists() else {})
        return spec, quantization_of(config)


@contextmanager
def config_file(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON object from a file, which is named in a ``ModelError`` about it."""
    config = read_json(path)
    try:
        yield config
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


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
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    if _is_deeper(value, _MAX_DEPTH):
        raise ModelError(f"{path}: lists and objects in each other, more than {_MAX_DEPTH} deep")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether more than so many lists and objects are in each other."""
    level = [value]
    for _ in range(depth + 1):
        items = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [item for some in items for item in some]
    return bool(level)


def plain_name(stored: str, family: Family) -> str:
    """What a tensor is called in a model that reads text only, where its own model may read images too.

    What only this family, or only DeepSeek (``weight_scale_inv``), calls so is called as others call it.
    """
    name = stored.replace(".weight_scale_inv", ".weight_scale")
    for prefix, replacement in (("model.language_model.", "model."), ("language_model.", "")):
        if stored.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
    for end, usual in family.names.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(end) + usual
    return name


def read_header(path: Path) -> Header:
    """Shape and type of each tensor of a safetensors file, or ``ModelError``."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: corrupt or truncated: {error}") from error


def checked_tensors(directory: Path, spec: ModelSpec, quantization: Quantization | None) -> dict[str, tuple[Path, str]]:
    """File and name of each stored tensor; ``ModelError`` where one that the model needs is not there, in shape."""
    stored: dict[str, tuple[Path, str, tuple[int, ...], str | None]] = {}
    family = family_of(spec.architecture)
    for path in weight_files(directory):
        stored |= {plain_name(name, family): (path, name, *info) for name, info in read_header(path).items()}
    for name, (types, wanted) in sorted(_wanted(spec, quantization, stored).items()):
        if name not in stored:
            raise ModelError(f"{directory}: tensor {name!r} is missing")
        path, _, shape, dtype = stored[name]
        if shape != wanted and (wanted or prod(shape) != 1):  # a scalar may be a list of one
            raise ModelError(f"{path}: tensor {name!r} has the shape {shape}, must be {wanted}")
        if dtype not in types:
            raise ModelError(f"{path}: tensor {name!r} has the unsupported type {dtype}")
    return {name: (path, stored_name) for name, (path, stored_name, *_) in stored.items()}


def _wanted(spec: ModelSpec, quantization: Quantization | None, stored: Container[str]) -> dict[str, Part]:
    """The tensors that the files must have: a quantised matrix is several."""
    wanted = {}
    for name, shape in stored_shapes(spec, stacks_experts=False).items():
        module = None if quantization is None else quantization.module_of(name, shape, stored)
        if quantization is None or module is None:
            # Several matrices that are not quantised have columns first.
            wanted[name] = Part(FLOATS, shape if len(shape) < 3 else (shape[0], shape[2], shape[1]))
        else:
            *outer, n, k = shape
            for part, (types, each) in quantization.parts(n, k).items():
                wanted[f"{module}.{part}"] = Part(types, (*outer, *each))
    return wanted
