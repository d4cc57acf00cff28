"""Defaults that depend on the device."""

from __future__ import annotations

from typing import Literal

import pytest

from evospec.engine import gpu
from evospec.engine.config import CacheConfig, EngineConfig, RuntimeConfig, SchedulerConfig

Device = Literal["auto", "cpu", "cuda"]


def sizes(engine: EngineConfig) -> tuple[int | None, float, int]:
    return engine.cache.max_bytes, engine.cache.memory_fraction, engine.scheduler.max_batched_tokens


ON_CPU, ON_GPU = (2 * 1024**3, 0.5, 512), (None, 0.95, 8192)


def set_gpu(monkeypatch: pytest.MonkeyPatch, *, is_there: bool, lacks: str | None = None) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: is_there)
    monkeypatch.setattr(gpu, "why_not_gpu", lambda: None)
    monkeypatch.setattr(gpu, "why_not_flashinfer", lambda: lacks)


@pytest.mark.parametrize(
    ("device", "backend", "is_there", "lacks", "expected"),
    [
        ("auto", "auto", False, None, ON_CPU),
        ("auto", "auto", True, None, ON_GPU),
        ("auto", "auto", True, "nvcc", ON_CPU),
        ("auto", "torch", True, "nvcc", ON_CPU),
        ("cpu", "auto", True, None, ON_CPU),
        ("cuda", "auto", False, None, ON_GPU),
        ("cuda", "torch", True, None, ON_CPU),
    ],
)
def test_sizes_are_those_of_the_device(
    device: Device,
    backend: Literal["auto", "torch"],
    is_there: bool,
    lacks: str | None,
    expected: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_gpu(monkeypatch, is_there=is_there, lacks=lacks)
    made = EngineConfig(runtime=RuntimeConfig(device=device, attention_backend=backend))
    assert sizes(made) == expected
    # The engine process reads what the server has written; so does one that sees no GPU any more.
    set_gpu(monkeypatch, is_there=False)
    assert sizes(EngineConfig.model_validate_json(made.model_dump_json())) == expected


def test_what_an_operator_says_holds_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpu(monkeypatch, is_there=True)
    cache, scheduler = CacheConfig(max_bytes=4096), SchedulerConfig(max_batched_tokens=512)
    assert sizes(EngineConfig(cache=cache, scheduler=scheduler)) == (4096, 0.95, 512)
