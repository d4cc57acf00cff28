"""Compiles kernels/csrc into kernels/_native.so: ``python -m kernels.build``.

A plain shared library with a C interface, so neither torch's headers nor its compiler settings matter, and the
build takes seconds. Without a C++ compiler the torch fallback serves, slower: the command says so and succeeds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = Path(__file__).parent / "_native.so"
# Always the same target: whether a machine can run it is decided when it is loaded (kernels/native.py), and AMX is
# used only where it is found (csrc/tiles.cpp).
TARGET = "avx512f avx512bw avx512dq avx512vl avx512vbmi avx512bf16 avx512vnni amx-tile amx-bf16 f16c fma"
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-ignored-attributes"]


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler named by CXX, of g++ or clang++ on the PATH, or of the ``ziglang`` package."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    path = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if path is not None:
        return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def is_current() -> bool:
    """Whether the library is newer than every source file."""
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    return LIBRARY.exists() and LIBRARY.stat().st_mtime >= newest


def build(compiler: list[str]) -> None:
    """Compiles, and replaces the library in one step, so that a running server never sees half a file.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is on stderr.
    """
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:
        output = Path(folder) / LIBRARY.name
        target = [f"-m{feature}" for feature in TARGET.split()]
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        subprocess.run([*compiler, *FLAGS, *target, *sources, "-o", str(output)], check=True)
        output.replace(LIBRARY)


def main() -> None:
    """Builds if needed; exits 0 without a library where there is no compiler or it fails."""
    if is_current():
        return
    compiler = find_compiler()
    if compiler is None:
        print("kernels: no C++ compiler (pip install ziglang is one); using the slower torch fallback", file=sys.stderr)
        return
    try:
        build(compiler)
    except subprocess.CalledProcessError:
        print(f"kernels: {compiler[0]} failed; the slower torch fallback will be used", file=sys.stderr)
        return
    print(f"kernels: built {LIBRARY}")


if __name__ == "__main__":
    main()
