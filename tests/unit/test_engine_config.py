"""Defaults that depend on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from engine import config
from engine.config import CacheConfig, EngineConfig, RuntimeConfig, SchedulerConfig

Device = Literal["auto", "cpu", "cuda"]


def sizes(engine: EngineConfig) -> tuple[int | None, float, int]:
    return engine.cache.max_bytes, engine.cache.memory_fraction, engine.scheduler.max_batched_tokens


ON_CPU, ON_GPU = (2 * 1024**3, 0.5, 512), (None, 0.95, 8192)


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"),
    [("auto", False, ON_CPU), ("auto", True, ON_GPU), ("cpu", True, ON_CPU), ("cuda", False, ON_GPU)],
)
def test_sizes_are_those_of_the_device(
    device: Device, has_gpu: bool, expected: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "_NVIDIA", tmp_path if has_gpu else tmp_path / "none")
    made = EngineConfig(runtime=RuntimeConfig(device=device))
    assert sizes(made) == expected
    # The engine process reads what the server has written; so does one that sees no GPU any more.
    monkeypatch.setattr(config, "_NVIDIA", tmp_path / "none")
    assert sizes(EngineConfig.model_validate_json(made.model_dump_json())) == expected


def test_what_an_operator_says_holds_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "_NVIDIA", tmp_path)
    cache, scheduler = CacheConfig(max_bytes=4096), SchedulerConfig(max_batched_tokens=512)
    assert sizes(EngineConfig(cache=cache, scheduler=scheduler)) == (4096, 0.95, 512)
