"""A tiny random target in float32, and a draft for it that has much to learn: answers are exact, and versions come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint, lora_layout
from evospec.engine.online.weight_layout import WeightLayout
from tests.tiny_drafts import make_draft_directory
from tests.tiny_models import VOCAB_SIZE, make_directory

_SHARPNESS = 3.0
_LIKELY = slice(100, 116)
"""Tokens that make up most of each answer, so that a draft is right by chance now and then, and can learn when."""
_LIKELIHOOD = 4.0


@dataclass(frozen=True)
class FaultModel:
    """Target and draft on disk, and the layout of the adapters that a server has with ``options``."""

    target: Path
    draft: Path
    options: AdaptersConfig

    @classmethod
    def make(cls, directory: Path, options: AdaptersConfig) -> FaultModel:
        files = make_directory(directory / "tiny")
        weights = load_file(files.path / "model.safetensors")
        weights["lm_head.weight"] *= _SHARPNESS
        weights["lm_head.weight"][_LIKELY] *= _LIKELIHOOD
        save_file(weights, files.path / "model.safetensors", metadata={"format": "pt"})
        _name_all_tokens(files.path / "tokenizer.json")
        return cls(files.path, make_draft_directory(directory / "draft", files), options)

    def layout(self, rank: int | None = None) -> WeightLayout:
        """Of an adapter; ``rank``: another one's."""
        draft = load_draft(self.draft, torch.float32, torch.device("cpu"))
        base = draft_fingerprint(self.draft)
        return lora_layout(draft.config, rank or self.options.rank, self.options.targets, base)


def _name_all_tokens(path: Path) -> None:
    """Answers are compared by their tokens' names; those of the padding would all be the same."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([f"<{token}>" for token in range(tokenizer.get_vocab_size(), VOCAB_SIZE)])
    tokenizer.save(str(path))
