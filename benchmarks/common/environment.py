"""On what a record was made."""

from __future__ import annotations

import platform
from typing import Any

import torch

from benchmarks.common.machine import provenance
from evospec.engine.config import RuntimeConfig
from evospec.kernels import native


def environment() -> dict[str, Any]:
    return provenance() | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "activation_bits": int(RuntimeConfig().activation_bits) if native.unsupported_reason() is None else None,
    }
