"""Which attention backend ``auto`` takes on a GPU, and what is refused; asked without one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import loader
from engine.config import EngineConfig, ModelConfig, RuntimeConfig
from engine.loader import _backend
from engine.models.config import ModelError
from engine.models.registry import validate_model_files
from tests.tiny_models import make_directory


@pytest.mark.parametrize(
    ("installed", "toolkit", "head_dim", "dtype", "expected"),
    [
        ({"flashinfer"}, "/usr/local/cuda", 64, "auto", "flashinfer"),
        ({"flashinfer"}, None, 64, "auto", "torch"),
        ({"flashinfer", "flashinfer_jit_cache"}, None, 64, "auto", "flashinfer"),
        (set(), "/usr/local/cuda", 64, "auto", "torch"),
        ({"flashinfer"}, "/usr/local/cuda", 80, "auto", "torch"),
        ({"flashinfer"}, "/usr/local/cuda", 64, "float32", "torch"),
    ],
)
def test_auto_takes_flashinfer_where_it_can(
    installed: set[str],
    toolkit: str | None,
    head_dim: int,
    dtype: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(loader, "_cuda_toolkit", lambda: toolkit)
    spec = replace(validate_model_files(make_directory(tmp_path)), head_dim=head_dim)
    config = EngineConfig(model=ModelConfig.model_validate({"dtype": dtype}))
    assert _backend(config, spec, torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("asked", "device", "head_dim", "reason"),
    [
        ("flashinfer", "cpu", 64, "flashinfer needs a CUDA device, not cpu"),
        ("flashinfer", "cuda", 80, "head_dim is 80"),
        ("native", "cuda", 64, "the model runs on a GPU"),
    ],
)
def test_what_was_asked_for_by_name_and_cannot_be_had_is_refused(
    asked: str, device: str, head_dim: int, reason: str, tmp_path: Path
) -> None:
    spec = replace(validate_model_files(make_directory(tmp_path)), head_dim=head_dim)
    config = EngineConfig(runtime=RuntimeConfig.model_validate({"attention_backend": asked}))
    with pytest.raises(ModelError, match=f"runtime.attention_backend {asked} cannot be used: {reason}"):
        _backend(config, spec, torch.device(device))
