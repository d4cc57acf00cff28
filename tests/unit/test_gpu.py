"""What a GPU lacks, by machines that are made up: programs, packages and drivers."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evospec.engine import gpu
from evospec.engine.gpu import why_not_flashinfer, why_not_gpu


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    why_not_gpu.cache_clear()
    why_not_flashinfer.cache_clear()
    yield
    why_not_gpu.cache_clear()
    why_not_flashinfer.cache_clear()


def make_program(directory: Path, name: str, says: str = "") -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


class Driver:
    """``libcuda.so.1`` as far as it is asked."""

    def __init__(self, cuda: int = 13000, capability: tuple[int, int] = (9, 0), failure: int = 0) -> None:
        self._cuda, self._capability, self._failure = cuda, capability, failure

    def cuInit(self, flags: int) -> int:
        return self._failure

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self._cuda
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:
        number._obj.value = self._capability[attribute - 75]
        return 0


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(), None),
        (Driver(cuda=13010), None),
        (Driver(cuda=12080), "the driver is too old: it knows CUDA 12.8, and torch is built with 13.0"),
        (Driver(capability=(7, 5)), "older than Ampere: its compute capability is 7.5"),
        (Driver(failure=100), "CUDA error 100"),
        (None, "there is no driver"),
    ],
)
def test_drivers(driver: Driver | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(gpu, "_torch_cuda", lambda: (13, 0))
    monkeypatch.setattr(gpu, "_why_not_triton", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", load)
    said = why_not_gpu()
    assert said is reason if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("line", "cuda"), [("cuda: Optional[str] = '13.0'", (13, 0)), ("cuda: Optional[str] = None", None)]
)
def test_what_torch_is_built_with(
    line: str, cuda: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    monkeypatch.setattr(gpu, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert gpu._torch_cuda() == cuda


@pytest.mark.parametrize(
    ("compilers", "has_headers", "reason"),
    [(["gcc"], True, None), (["clang"], True, None), ([], True, "C compiler"), (["gcc"], False, "Python's headers")],
)
def test_triton_compiles_when_it_is_first_used(
    compilers: list[str], has_headers: bool, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in compilers:
        make_program(tmp_path, name)
    (tmp_path / "Python.h").touch() if has_headers else None
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    said = gpu._why_not_triton()
    assert said is reason if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("packages", "programs", "release", "reason"),
    [
        ({}, ["ninja", "c++"], "13.0", "flashinfer is not installed"),
        ({"flashinfer-python": "0.7.4"}, ["ninja", "c++"], "13.0", None),
        ({"flashinfer-python": "0.7.4"}, ["c++"], "13.0", "there is no ninja"),
        ({"flashinfer-python": "0.7.4"}, ["ninja"], "13.0", "there is no c++"),
        ({"flashinfer-python": "0.7.4"}, ["ninja", "c++"], "12.6", "nvcc 12.8 or newer, not 12.6"),
        ({"flashinfer-python": "0.7.4"}, ["ninja", "c++"], None, "there is no nvcc"),
        ({"flashinfer-python": "0.7.4", "flashinfer-jit-cache": "0.7.4+cu130"}, [], None, None),
        ({"flashinfer-python": "0.7.4", "flashinfer-jit-cache": "0.7.2+cu130"}, [], None, "there is no ninja"),
    ],
)
def test_flashinfer_compiles_its_kernels_or_has_them(
    packages: dict[str, str],
    programs: list[str],
    release: str | None,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compiler of a toolkit is taken from ``CUDA_HOME``, where a directory alone is none."""

    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    for name in programs:
        make_program(tmp_path / "programs", name)
    if release is not None:
        make_program(tmp_path / "bin", "nvcc", f"Cuda compilation tools, release {release}, V{release}.48")
    monkeypatch.setattr(gpu, "version", version)
    monkeypatch.setattr(gpu, "search_path", lambda: str(tmp_path / "programs"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    said = why_not_flashinfer()
    assert said is reason if reason is None else reason in str(said)


def test_programs_of_packages_are_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to activate a virtual environment."""
    monkeypatch.setenv("PATH", "/usr/bin")
    assert gpu.search_path() == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"
