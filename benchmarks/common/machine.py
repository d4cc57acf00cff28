"""What is measured, and on which machine. Without torch: clients that load a server import it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def provenance() -> dict[str, Any]:
    """When, on what and of which commit a record is made."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": cpu_description(),
        "load_average_at_start": os.getloadavg()[0],
    }


def write_record(name: str, record: Mapping[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
