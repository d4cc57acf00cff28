"""What is measured, and on which machine. Without torch: clients that load a server import it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


def cpu_description() -> str:
    """Model name and the vector extensions that matter, from /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", text)
    flags = re.search(r"flags\s*: (.*)", text)
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    present = [flag for flag in wanted if flags and flag in flags[1].split()]
    return f"{name[1] if name else 'unknown CPU'}, {os.cpu_count()} cores, {' '.join(present)}"


def git_commit(directory: Path = REPOSITORY) -> str:
    """The commit that is measured, with ``+`` behind it if tracked files other than records differ from it."""
    git = ["git", "-C", str(directory)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    all_but_records = ["--", ":/", ":!benchmarks/results"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", *all_but_records], check=False).returncode != 0
    return f"{commit}+" if changed else commit
