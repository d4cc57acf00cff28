"""What a model's files recommend for sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.sampling_defaults import SamplingDefaults, sampling_defaults


def of_config(directory: Path, config: dict[str, Any] | None) -> SamplingDefaults:
    if config is not None:
        (directory / "generation_config.json").write_text(json.dumps(config))
    return sampling_defaults(ModelFiles("model", directory, "safetensors"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, SamplingDefaults(temperature=0.7)),
        ({"eos_token_id": 2, "do_sample": True}, SamplingDefaults(temperature=0.7)),
        ({"temperature": 1}, SamplingDefaults(temperature=1.0)),
        (
            {"repetition_penalty": 1.1, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "min_p": None},
            SamplingDefaults(repetition_penalty=1.1, temperature=0.6, top_p=0.8, top_k=20),
        ),
    ],
)
def test_generation_config_is_taken(tmp_path: Path, config: dict[str, Any] | None, expected: SamplingDefaults) -> None:
    assert of_config(tmp_path, config) == expected


@pytest.mark.parametrize("config", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}])
def test_a_recommendation_that_cannot_be_followed_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"recommends.*{next(iter(config))}"):
        of_config(tmp_path, config)


@pytest.mark.parametrize(
    ("name", "recommended", "expected"),
    [
        ("model", {}, SamplingDefaults()),
        ("smollm2-135m", {}, SamplingDefaults(temperature=0.2, top_p=0.9)),
        ("smollm2-135m", {"temp": 0.5, "top_k": 40}, SamplingDefaults(temperature=0.5, top_k=40)),
    ],
)
def test_metadata_of_a_gguf_file_goes_before_the_registry(
    tmp_path: Path, name: str, recommended: dict[str, float], expected: SamplingDefaults
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in recommended.items():
        if isinstance(value, int):
            writer.add_int32(f"general.sampling.{key}", value)
        else:
            writer.add_float32(f"general.sampling.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert sampling_defaults(ModelFiles(name, path, "gguf")) == expected
