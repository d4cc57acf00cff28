"""Every Triton kernel compiles for three generations of GPUs, none of which is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.combinations import EVERY

GENERATIONS = ("80", "90", "100")
KERNELS = {
    *("_gumbel_argmax_kernel", "_thresholds_kernel", "_core_kernel", "_tail_kernel", "_lora_kernel"),
    *("_repeats_kernel", "_prior_kernel", "_edit_kernel", "_mask_kernel", "_best_kernel"),
    *("_norm_kernel", "_heads_kernel", "_gate_kernel", "_int4_kernel", "_expand_kernel"),
}
READ_AHEAD = {"_core_kernel", "_tail_kernel", "_lora_kernel", "_int4_kernel"}
"""Those that read a matrix piece by piece: while they add up one piece, the next ones are on their way."""
pytest.importorskip("triton")


def test_kernels_compile() -> None:
    which = "every" if os.environ.get(EVERY) else "each"
    command = [sys.executable, "-m", "tests.compiled_triton", which, *GENERATIONS]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    compiled = Counter((generation, kernel) for generation, kernel, _, _ in lines)
    expected = {(generation, kernel) for generation in GENERATIONS for kernel in KERNELS}
    assert compiled.keys() == expected | {("90", "_quantize_kernel"), ("100", "_quantize_kernel")}
    assert {kernel for _, kernel, _, num_ahead in lines if int(num_ahead)} >= READ_AHEAD
