"""On what a record was made."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.common.machine import cpu_description, git_commit
from engine.config import RuntimeConfig
from kernels import native


def environment() -> dict[str, Any]:
    """Machine and versions, for the record."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": cpu_description(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "activation_bits": int(RuntimeConfig().activation_bits) if native.unsupported_reason() is None else None,
    }
