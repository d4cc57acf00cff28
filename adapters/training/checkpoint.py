"""Checkpoints of draft training: master weights, optimiser state and progress, in one file without pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from evospec.engine.models.config import ModelError

_PROGRESS = "progress"


@dataclass
class TrainingProgress:
    """How far a run is. ``history`` has one entry for each validation."""

    step: int = 0
    anchors: int = 0  # positions trained on, every pass counted
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer, progress: TrainingProgress
) -> None:
    """Replace the checkpoint of a directory, as a whole."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"draft.{name}": tensor for name, tensor in draft.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    partial = directory / "checkpoint.partial"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, {_PROGRESS: json.dumps(asdict(progress))})
    partial.rename(directory / "checkpoint.safetensors")


def load_checkpoint(directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress | None:
    """Restore everything in place; None where there is no checkpoint.

    Raises:
        ModelError: it is of a draft of another shape, or of another version.
    """
    path = directory / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, str] = file.metadata() or {}
    if _PROGRESS not in metadata:
        raise ModelError(f"{path}: of an older version; give this run a name of its own (--run)")
    try:
        draft.load_state_dict({k.removeprefix("draft."): v for k, v in tensors.items() if k.startswith("draft.")})
    except RuntimeError as error:
        raise ModelError(f"{path}: of a draft of another shape; give this run a name of its own (--run)") from error
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            number, key = name.split(".")[1:]
            state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return TrainingProgress(**json.loads(metadata[_PROGRESS]))
