"""Whether this machine has a GPU, and what it lacks of all that serving on one takes. Torch-free: the server asks, too.

NOT RUN on a GPU so far.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_DEVICES = Path("/dev/nvidiactl"), Path("/dev/dxg")
"""What there is with a GPU under Linux, and under WSL 2."""
_OLDEST = (8, 0)
"""Compute capability of the first GPUs with bfloat16, Ampere's."""
_TOOLKIT = (12, 8)
"""The first CUDA toolkit whose compiler knows all options that flashinfer gives it."""
_CAPABILITY = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR``"""
_IS_CUDA = re.compile(r"^cuda: .*= '(\d+)\.(\d+)'", re.MULTILINE)
_IS_RELEASE = re.compile(r"release (\d+)\.(\d+)")


def has_gpu() -> bool:
    """Whether there is one by NVIDIA, of any kind."""
    return any(device.exists() for device in _DEVICES)


def search_path() -> str:
    """Where programs are looked for: also beside this Python, where pip puts those of packages, such as ninja."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


@cache
def why_not_gpu() -> str | None:
    """Why torch and Triton cannot compute on it; None: they can."""
    needed = _torch_cuda()
    if needed is None:
        return "torch has no CUDA"
    return _why_not_driver(needed) or _why_not_triton()


@cache
def why_not_flashinfer() -> str | None:
    """Why flashinfer, which is installed apart and compiles kernels when they are first used, cannot; None: it can."""
    try:
        installed = version("flashinfer-python")
    except PackageNotFoundError:
        return "flashinfer is not installed (pip install 'evospec[gpu]')"
    if _version_of_compiled_kernels() == installed:
        return None
    for program in ("ninja", "c++"):
        if shutil.which(program, path=search_path()) is None:
            return f"flashinfer compiles its kernels, and there is no {program}"
    release = _nvcc_release()
    if release is None:
        return "flashinfer compiles its kernels, and there is no nvcc (set CUDA_HOME, or install flashinfer-jit-cache)"
    if release < _TOOLKIT:
        return f"flashinfer compiles its kernels with nvcc {_dotted(_TOOLKIT)} or newer, not {_dotted(release)}"
    return None


def _torch_cuda() -> tuple[int, int] | None:
    """The version of CUDA that torch is built with; None: without it."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    found = _IS_CUDA.search(Path(torch.origin).with_name("version.py").read_text())
    return None if found is None else (int(found[1]), int(found[2]))


def _why_not_driver(needed: tuple[int, int]) -> str | None:
    """What the driver says of itself and of the first GPU. No memory is taken on that."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no driver (libcuda.so.1)"
    number, device = ctypes.c_int(), ctypes.c_int()
    if (failure := driver.cuInit(0)) != 0:
        return f"the driver does not start (CUDA error {failure}; CUDA_VISIBLE_DEVICES may leave no GPU)"
    driver.cuDriverGetVersion(ctypes.byref(number))
    if number.value // 1000 < needed[0]:
        knows = number.value // 1000, number.value % 1000 // 10
        return f"the driver is too old: it knows CUDA {_dotted(knows)}, and torch is built with {_dotted(needed)}"
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return "no GPU is visible (CUDA_VISIBLE_DEVICES)"
    capability = []
    for attribute in _CAPABILITY:
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    if tuple(capability) < _OLDEST:
        return f"it is older than Ampere: its compute capability is {_dotted(capability)}, not {_dotted(_OLDEST)}"
    return None


def _why_not_triton() -> str | None:
    """It compiles a module for Python when it first launches a kernel."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler (gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python's headers (python3-dev)"
    return None


def _version_of_compiled_kernels() -> str | None:
    """Of flashinfer-jit-cache, which has flashinfer's kernels. It is not used beside another version of flashinfer."""
    try:
        return version("flashinfer-jit-cache").partition("+")[0]
    except PackageNotFoundError:
        return None


def _nvcc_release() -> tuple[int, int] | None:
    """Of the nvcc that flashinfer calls; None: there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    nvcc = Path(home, "bin", "nvcc") if home else Path(on_path)
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = _IS_RELEASE.search(said)
    return None if found is None else (int(found[1]), int(found[2]))


def _dotted(numbers: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, numbers))
