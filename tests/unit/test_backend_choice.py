"""Which attention backend ``auto`` takes on a GPU; asked without one."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import loader
from engine.config import EngineConfig, ModelConfig
from engine.loader import _backend
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
