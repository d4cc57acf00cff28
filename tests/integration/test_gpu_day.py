"""The script for the first half hour with a GPU, as far as an emulated device carries it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_it_compares_answers_with_and_without_drafts(tmp_path: Path) -> None:
    """How many are the same only a GPU can say: in bfloat16 a sum may be rounded otherwise beside other rows."""
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--emulated", "--only", "exactness", "--report", str(report)]
    subprocess.run(command, check=True, timeout=120)
    text = report.read_text()
    assert text.startswith("## exactness: done")
    assert text.count(" of 8 outputs are those without drafts") == 2
