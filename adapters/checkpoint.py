"""Checkpoints of draft training: master weights, optimiser state and progress, in two files without pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.models.config import ModelError


@dataclass
class Progress:
    """How far a run is. ``history`` has one entry for each validation."""

    step: int = 0
    anchors: int = 0
    """Positions trained on, every pass counted."""
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint of a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"draft.{name}": tensor for name, tensor in draft.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    partial = directory / "checkpoint.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.rename(directory / "checkpoint.safetensors")
    (directory / "progress.json").write_text(json.dumps(asdict(progress), indent=1))


def load_checkpoint(directory: Path, draft: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore everything in place; None where there is no checkpoint.

    Raises:
        ModelError: it is of a draft of another shape.
    """
    path = directory / "checkpoint.safetensors"
    if not path.exists():
        return None
    tensors = load_file(path)
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
    return Progress(**json.loads((directory / "progress.json").read_text()))
