"""The tests of the kernels again, with the libraries that this machine does not use otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evospec.kernels.build import build, find_compiler, is_current
from evospec.kernels.targets import PLAIN, TARGETS, Target, best_target

AVX2 = TARGETS[-1]
KERNELS = ("native_kernels", "native_eagle3", "draft_head", "batched_lora")
SAMPLING = ("gumbel", "kept_thresholds", "topk", "penalties")
FILES = [*(f"tests/unit/test_{name}.py" for name in KERNELS + SAMPLING), "tests/integration/test_draft_chains.py"]
# Before anything imports the list: a process loads one library.
RUN = """
import sys
from evospec.kernels import targets
targets.TARGETS = tuple(target for target in targets.TARGETS if target.name in sys.argv[1])
import pytest
from evospec.kernels import native, session_library
assert not targets.TARGETS or native.unsupported_reason() is None, native.unsupported_reason()
assert sys.argv[1] in session_library.load()._name
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.skipif(best_target() in (None, AVX2), reason="the other tests run this library, or nothing can")
def test_kernels_for_avx2() -> None:
    check(AVX2, FILES)


def test_sessions_for_any_processor() -> None:
    check(PLAIN, ["tests/unit/test_native_sessions.py", "tests/unit/test_draft_vocab.py"])


def check(target: Target, files: list[str]) -> None:
    compiler = find_compiler()
    if not is_current(target):
        assert compiler is not None
        build(compiler, target)
    # Triton is not in the library, other processes load the usual one, and small models have all that a large one has.
    options = ["-q", "-p", "no:cacheprovider", "-k", "not triton and not process_of_its_own and not smollm2"]
    command = [sys.executable, "-c", RUN, target.name, *options, *files]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
