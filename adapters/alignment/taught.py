"""The draft that a worker teaches: the one that the engine drafts with, or the seed of one that grows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evospec.adapters.alignment.chains import ChainDrafter
from evospec.adapters.alignment.growth import DraftGrower, seed_of_draft
from evospec.adapters.alignment.updates import Updater
from evospec.adapters.target_parts import fastest_dtype, load_target_parts
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.config import EngineConfig
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.online.whole_draft import growing_fingerprint
from evospec.engine.speculation.draft_files import DRAFTS, choose_method


@dataclass(frozen=True)
class TaughtDraft:
    """A draft and how it is taught.

    Args:
        config: its ``redis_url`` is set.
        base: the draft as it is without what was learned.
        fingerprint: of the base, hexadecimal.
        updater: makes what owns the weights of a key.
    """

    config: AdaptersConfig
    base: ChainDrafter
    fingerprint: str
    updater: type[Updater] = Updater

    @property
    def row_size(self) -> int:
        """Values of a row of the feature ring."""
        fusion = self.base.draft.fc
        width = fusion.in_features if self.updater.trains_fusion else fusion.out_features
        return width + fusion.out_features * self.updater.grows


def load_taught(config: EngineConfig, updater: type[Updater]) -> TaughtDraft:
    """The draft that the engine of ``config`` has.

    Raises:
        ModelError: there is none, or a file cannot be read.
    """
    files = resolve_model(config.model, progress=False)
    spec = validate_model_files(files)
    method, directory = choose_method(config, files)
    if method == "grow":
        seed = seed_of_draft(files, spec, config.model.max_model_len)
        growing = config.alignment.for_growth(seed.draft.config.recorded_size)
        return TaughtDraft(growing, seed, growing_fingerprint(open_weights(files), spec), DraftGrower)
    directory = directory or DRAFTS / files.name
    eagle = load_draft(directory, fastest_dtype(), torch.device("cpu"))
    eagle.config.check_target(spec, directory)
    target = load_target_parts(files, spec, config.model.max_model_len)
    return TaughtDraft(config.alignment, ChainDrafter(eagle, target), draft_fingerprint(directory), updater)
