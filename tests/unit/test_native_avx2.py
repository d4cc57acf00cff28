"""Where the CPU has AVX-512: the tests of the kernels again, with the library for AVX2, which is not used otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernels.build import build, find_compiler, is_current
from kernels.targets import TARGETS, best_target

AVX2 = TARGETS[-1]
KERNELS = ("native_kernels", "native_prior", "native_eagle3", "draft_head", "batched_lora")
SAMPLING = ("gumbel", "kept_thresholds", "topk", "penalties")
FILES = [*(f"tests/unit/test_{name}.py" for name in KERNELS + SAMPLING), "tests/integration/test_draft_chains.py"]
# Before anything imports the list: a process loads one library.
RUN = """
import sys
from kernels import targets
targets.TARGETS = targets.TARGETS[-1:]
from kernels import native
assert native.unsupported_reason() is None, native.unsupported_reason()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.skipif(best_target() in (None, AVX2), reason="the other tests run this library, or nothing can")
def test_kernels_for_avx2() -> None:
    compiler = find_compiler()
    if not is_current(AVX2):
        assert compiler is not None
        build(compiler, AVX2)
    command = [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *FILES]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
