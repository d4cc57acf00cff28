"""What a version of an EAGLE-3 draft consists of: a low-rank adapter (LoRA, arXiv 2106.09685).

It has two tensors for each target: ``<target>.a`` [rank, inputs] and ``<target>.b`` [rank, outputs]. The
adapted layer gives ``x @ W.T + (x @ a.T) @ b``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from evospec.engine.adapters_config import LoraTarget
from evospec.engine.models.eagle3_config import CONFIG_FILE, WEIGHTS_FILE, Eagle3Config
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout
from evospec.kernels.batched_lora import LoraMatrix


@dataclass(frozen=True)
class AdaptedRows:
    """Rows ``start`` .. ``end`` - 1 of a matrix [outputs, ``num_inputs``]."""

    matrix: LoraMatrix
    start: int
    end: int
    num_inputs: int


def adapted_rows(config: Eagle3Config, target: LoraTarget) -> AdaptedRows:
    """Where a target lies in the draft's weights."""
    hidden = config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q": AdaptedRows("qkv", 0, queries, 2 * hidden),
        "k": AdaptedRows("qkv", queries, queries + keys, 2 * hidden),
        "v": AdaptedRows("qkv", queries + keys, queries + 2 * keys, 2 * hidden),
        "o": AdaptedRows("output", 0, hidden, queries),
        "down": AdaptedRows("down", 0, hidden, config.intermediate_size),
    }[target]


def lora_layout(config: Eagle3Config, rank: int, targets: Collection[LoraTarget], base: str) -> WeightLayout:
    """Layout (bf16) of a weight channel for adapters of one draft, whose ``draft_fingerprint`` is ``base``."""
    shapes = {}
    for target in targets:
        rows = adapted_rows(config, target)
        shapes[f"{target}.a"] = (rank, rows.num_inputs)
        shapes[f"{target}.b"] = (rank, rows.end - rows.start)
    return WeightLayout(tuple(TensorSpec(name, shape, torch.bfloat16) for name, shape in sorted(shapes.items())), base)


def draft_fingerprint(directory: Path) -> str:
    """SHA-256 of a draft's files, 64 hexadecimal digits; raises ``OSError``."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update(hashlib.sha256((directory / name).read_bytes()).digest())
    return digest.hexdigest()
