"""Which attention backend ``auto`` takes on a GPU, and what is refused; asked without one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from evospec.engine import gpu
from evospec.engine.config import EngineConfig, ModelConfig, RuntimeConfig
from evospec.engine.loader import _backend, choose_device
from evospec.engine.models.config import ModelError
from evospec.engine.models.registry import validate_model_files
from tests.tiny_models import make_directory


@pytest.mark.parametrize(
    ("lacks", "head_dim", "dtype", "reason"),
    [
        (None, 64, "auto", None),
        ("it is not installed", 64, "auto", "it is not installed"),
        (None, 80, "auto", "head_dim is 80"),
        (None, 64, "float32", "not float32"),
    ],
)
def test_auto_takes_flashinfer_and_nothing_else(
    lacks: str | None, head_dim: int, dtype: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in plain torch takes memory for which a GPU has none kept free: only who asks for it has it there."""
    monkeypatch.setattr(gpu, "why_not_flashinfer", lambda: lacks)
    spec = replace(validate_model_files(make_directory(tmp_path)), head_dim=head_dim)
    config = EngineConfig(model=ModelConfig.model_validate({"dtype": dtype}))
    with nullcontext() if reason is None else pytest.raises(ModelError, match=f"{reason}.*attention_backend torch"):
        assert _backend(config, spec, torch.device("cuda")) == "flashinfer"
    config.runtime.attention_backend = "torch"
    assert _backend(config, spec, torch.device("cuda")) == "torch"


@pytest.mark.parametrize(
    ("has_gpu", "lacks", "device", "expected"),
    [
        (False, "torch has no CUDA", "auto", "cpu"),
        (True, "the driver is too old", "auto", "cpu"),
        (True, None, "cpu", "cpu"),
        (True, "the driver is too old", "cuda", "the model cannot run on a GPU: the driver is too old"),
        (True, None, "auto", "torch finds none"),  # here, where there is none
    ],
)
def test_the_device(
    has_gpu: bool, lacks: str | None, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that lacks something is left alone, and the log says why; who asks for it gets an error."""
    monkeypatch.setattr(gpu, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(gpu, "why_not_gpu", lambda: lacks)
    monkeypatch.setattr(gpu, "why_not_flashinfer", lambda: None)
    runtime = RuntimeConfig.model_validate({"device": device})
    with capture_logs() as logs:
        if expected == "cpu":
            assert choose_device(runtime) == torch.device("cpu")
        else:
            with pytest.raises(ModelError, match=expected):
                choose_device(runtime)
    assert [log["reason"] for log in logs] == ([lacks] if has_gpu and (device, expected) == ("auto", "cpu") else [])


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
