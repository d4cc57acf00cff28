"""Compiles kernels/csrc into kernels/_native_*.so, one for each target: ``python -m kernels.build``.

Plain shared libraries with a C interface, so neither torch's headers nor its compiler settings matter, and the
build takes seconds. Without a C++ compiler the torch fallback serves, slower: the command says so and succeeds.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """One library: what its processor must have.

    Attributes:
        name: of the library.
        features: as compilers name them.
        required: CPU features as Linux names them.
    """

    name: str
    features: str
    required: tuple[str, ...]

    @property
    def library(self) -> Path:
        return FOLDER / f"_native_{self.name}.so"


# The best first. All are always built: which of them a machine runs is decided when it is loaded (kernels/native.py),
# and AMX is used only where it is found (csrc/tiles.cpp).
TARGETS = (
    Target(
        "avx512",
        "avx512f avx512bw avx512dq avx512vl avx512vbmi avx512bf16 avx512vnni amx-tile amx-bf16 f16c fma",
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_bf16", "avx512_vnni", "f16c", "fma"),
    ),
    Target("avx2", "avx2 f16c fma", ("avx2", "f16c", "fma")),
)
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-ignored-attributes"]


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler named by CXX, of g++ or clang++ on the PATH, or of the ``ziglang`` package."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    path = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if path is not None:
        return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def is_current() -> bool:
    """Whether all libraries are newer than every source file."""
    newest = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), Path(__file__)])
    libraries = [target.library for target in TARGETS]
    return all(library.exists() and library.stat().st_mtime >= newest for library in libraries)


def build(compiler: list[str], target: Target) -> None:
    """Compiles, and replaces the library in one step, so that a running server never sees half a file.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is on stderr.
    """
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        output = Path(folder) / target.library.name
        features = [f"-m{feature}" for feature in target.features.split()]
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        subprocess.run([*compiler, *FLAGS, *features, *sources, "-o", str(output)], check=True)
        output.replace(target.library)


def main() -> None:
    """Builds if needed; exits 0 without a library where there is no compiler or it fails."""
    if is_current():
        return
    compiler = find_compiler()
    if compiler is None:
        print("kernels: no C++ compiler (pip install ziglang is one); using the slower torch fallback", file=sys.stderr)
        return
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda target: build(compiler, target), TARGETS))
    except subprocess.CalledProcessError:
        print(f"kernels: {compiler[0]} failed; the slower torch fallback will be used", file=sys.stderr)
        return
    print(f"kernels: built {', '.join(target.library.name for target in TARGETS)}")


if __name__ == "__main__":
    main()
