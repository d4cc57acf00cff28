"""The engine's end of full-parameter online distillation: versions of the whole draft, in place of its own weights.

``python -m benchmarks.adapt.whole_draft`` is ``python -m engine.process`` with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine import process
from engine.adapters_config import AdaptersConfig
from engine.draft_state import BASE, Assignment
from engine.models.config import ModelError
from engine.models.eagle3 import Eagle3
from engine.models.eagle3_config import Eagle3Config
from engine.online.adapters import EagleAdapters
from engine.online.weight_layout import WeightLayout
from engine.speculation import build
from engine.speculation.drafters.eagle import EagleDraft
from engine.speculation.drafters.eagle_network import EagleNetwork
from kernels.batched_lora import LoraRows


def whole_layout(config: Eagle3Config, base: str) -> WeightLayout:
    """Layout (bf16) of a weight channel for all weights of a draft, by their names in ``Eagle3``."""
    with torch.device("meta"):
        weights = dict(Eagle3(config).named_parameters())
    return WeightLayout.of({name: weight.bfloat16() for name, weight in weights.items()}, base)


class WholeDraft(EagleAdapters):
    """One slot for all weights of the draft, which change for everybody at once. The base's are kept to return to.

    Raises:
        ModelError: as ``EagleAdapters``, or not everybody would draft with the slot.
    """

    trains_fusion = True
    network: EagleNetwork
    """Computes with the weights."""

    def __init__(self, config: AdaptersConfig, draft: Eagle3, base: str) -> None:
        if config.key_scope != "global" or config.log.control_share:
            raise ModelError(
                "alignment: the draft of all requests changes at once: that needs key_scope global, and "
                "log.control_share 0, since no request can keep the base draft"
            )
        self._base = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
        super().__init__(config, draft, base)
        self.num_bytes += sum(weight.nbytes for weight in self._base.values())

    def rows(self, requests: object) -> LoraRows | None:
        return None

    def _make_slots(self, draft: Eagle3, base: str) -> tuple[WeightLayout, Sequence[Mapping[str, torch.Tensor]]]:
        layout = whole_layout(draft.config, base)
        return layout, [
            {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) for spec in layout.tensors}
        ]

    def _put_in_force(self, index: int, assignment: Assignment) -> None:
        if assignment != BASE:
            self.network.load(self._tensors[index])
        elif self._in_force[index] != BASE:
            self.network.load(self._base)
        super()._put_in_force(index, assignment)


class DistilledDraft(EagleDraft):
    """An EAGLE-3 draft whose weights ``WholeDraft`` replaces."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if isinstance(self._adapters, WholeDraft):
            self._adapters.network = self._network


PARTS = {"EagleAdapters": WholeDraft, "EagleDraft": DistilledDraft}
"""What takes the place of what in ``engine.speculation.build``."""


def main() -> None:
    """Serve as ``engine.process`` does."""
    for name, part in PARTS.items():
        setattr(build, name, part)
    process.main()


if __name__ == "__main__":
    main()
