"""The ways to quantise safetensors that can be served, by their names in a ``config.json``. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evospec.engine.models.config import ModelError
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.quantization.awq import Awq
from evospec.engine.models.quantization.base import Quantization, supported
from evospec.engine.models.quantization.compressed_tensors import read_compressed_tensors
from evospec.engine.models.quantization.gptq import Gptq
from evospec.engine.models.quantization.mxfp4 import Mxfp4
from evospec.engine.models.quantization.scaled import Scaled

METHODS: Mapping[str, Callable[[ConfigKeys], Quantization]] = {
    "awq": Awq.read,
    "compressed-tensors": read_compressed_tensors,
    "fp8": Scaled.read,
    "gptq": Gptq.read,
    "mxfp4": lambda _: Mxfp4(),
}
"""By ``quant_method``: from ``quantization_config``; they raise ``ModelError`` for what is not supported."""


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Of a Hugging Face ``config.json``; None: there is none. ``ModelError`` for what is not supported."""
    keys = ConfigKeys(config)
    for part in (keys, keys.section("text_config")):
        quantization = part.section("quantization_config")
        if quantization.values:
            try:
                method = supported("quant_method", quantization.text("quant_method", ""), tuple(METHODS))
                return METHODS[method](quantization)
            except ModelError as error:
                raise ModelError(f"quantization_config: {error}") from None
    return None
