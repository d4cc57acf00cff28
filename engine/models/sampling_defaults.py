"""How a model's answers are sampled where a request does not say. Torch-free."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.safetensors_spec import read_json

_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of sampling. What nobody recommends is off, but for a temperature at which small models make sense.

    ``top_k`` 0 or -1, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 mean "off"; ``temperature`` 0 is greedy.
    """

    temperature: Annotated[float, Meta(ge=0)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0


_OF_REGISTRY = {
    # Its model card: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2-135m": SamplingDefaults(temperature=0.2, top_p=0.9),
    # Qwen2.5's generation_config.json, without its repetition penalty, which would also change greedy answers.
    "qwen2.5-coder-0.5b": SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
    "qwen2.5-coder-1.5b": SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
}
"""For models of these names whose files recommend nothing."""


def sampling_defaults(files: ModelFiles) -> SamplingDefaults:
    """What the model's ``generation_config.json``, or the metadata of its GGUF file, recommends.

    Raises:
        ModelError: a recommendation that nothing can be sampled with.
    """
    recommended, keys = {}, {name: name for name in SamplingDefaults.__struct_fields__}
    if files.format == "gguf":
        recommended, keys = GGUFFile(files.path).metadata, _GGUF_KEYS
    elif (path := files.path / "generation_config.json").exists():
        recommended = read_json(path)
    given = {name: recommended[key] for name, key in keys.items() if recommended.get(key) is not None}
    if not given and files.name in _OF_REGISTRY:
        return _OF_REGISTRY[files.name]
    try:
        return msgspec.convert(given, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise ModelError(f"{files.path}: the sampling parameters that the model recommends: {error}") from error
