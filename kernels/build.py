"""Compiles kernels/csrc into kernels/_native_<target>.so: ``python -m evospec.kernels.build``.

Plain shared libraries with a C interface, so neither torch's headers nor its compiler settings matter, and the
build takes seconds. Without a C++ compiler the torch fallback serves, slower: the command says so and succeeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evospec.kernels import targets
from evospec.kernels.targets import PLAIN, SOURCES, TARGETS, Target, best_target, sources_hash

FLAGS = ["-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-ignored-attributes"]


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler named by CXX, of g++ or clang++ on the PATH, or of the ``ziglang`` package."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    path = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if path is not None:
        return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def is_current(target: Target) -> bool:
    """Whether a library is of these sources, and was made by these rules."""
    if not target.is_of_these_sources:
        return False
    rules = max(Path(path).stat().st_mtime for path in (__file__, targets.__file__))
    return target.library.stat().st_mtime >= rules


def build(compiler: list[str], target: Target) -> None:
    """Compiles, and replaces the library in one step, so that a running server never sees half a file.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is on stderr.
    """
    with tempfile.TemporaryDirectory(dir=target.library.parent) as folder:
        output = Path(folder) / target.library.name
        features = [f"-m{feature}" for feature in target.features] + [f'-DEVO_SOURCES="{sources_hash()}"']
        sources = sorted(str(path) for path in SOURCES.glob(target.sources))
        subprocess.run([*compiler, *FLAGS, *features, *sources, "-o", str(output)], check=True)
        output.replace(target.library)


def main(wanted: Sequence[Target]) -> None:
    """Builds what is needed; exits 0 without a library where there is no compiler or it fails."""
    wanted = [target for target in wanted if not is_current(target)]
    if not wanted:
        return
    compiler = find_compiler()
    if compiler is None:
        print("kernels: no C++ compiler (pip install ziglang is one); using the slower torch fallback", file=sys.stderr)
        return
    for target in wanted:
        try:
            build(compiler, target)
        except subprocess.CalledProcessError:
            print(f"kernels: {compiler[0]} failed; the slower torch fallback will be used", file=sys.stderr)
            return
        print(f"kernels: built {target.library}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the CPU kernels for this machine.")
    parser.add_argument("--all", action="store_true", help="for every machine, as in an image")
    best = best_target()
    if best is None:
        print("kernels: this CPU has no AVX2; the model runs on the slower torch fallback", file=sys.stderr)
    main((*TARGETS, PLAIN) if parser.parse_args().all else [best or PLAIN])
