"""A draft whose weights come whole from the worker: one that grows from the traffic of a model without a draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.draft_state import BASE, Assignment
from engine.models.eagle3 import Eagle3
from engine.models.eagle3_config import Eagle3Config
from engine.online.adapters import EagleAdapters
from engine.online.weight_layout import WeightLayout
from engine.request import Request
from engine.speculation.drafters.eagle_network import EagleNetwork
from kernels.batched_lora import LoraRows


def whole_layout(config: Eagle3Config, base: str) -> WeightLayout:
    """Layout (bf16) of a weight channel for all weights of a draft, by their names in ``Eagle3``."""
    with torch.device("meta"):
        weights = dict(Eagle3(config).named_parameters())
    return WeightLayout.of({name: weight.bfloat16() for name, weight in weights.items()}, base)


class WholeDraft(EagleAdapters):
    """One slot for all weights of a draft. They draft for the slot's key; for everybody else there is no draft."""

    trains_fusion = True
    records_output = True
    logs_every_step = True
    network: EagleNetwork
    """Computes with the weights."""

    def rows(self, requests: object) -> LoraRows | None:
        """None: nothing is added to the weights."""
        return None

    def find_draft(self, requests: Sequence[Request]) -> list[bool]:
        """Take over what was published, and say for which of a step's decoding requests there is a draft."""
        self.refresh()
        self.assign(requests)
        return [request.draft_state.adapter != BASE for request in requests]

    def _make_slots(self, draft: Eagle3, base: str) -> tuple[WeightLayout, Sequence[Mapping[str, torch.Tensor]]]:
        layout = whole_layout(draft.config, base)
        return layout, [
            {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) for spec in layout.tensors}
        ]

    def _put_in_force(self, index: int, assignment: Assignment) -> None:
        if assignment != BASE:
            self.network.load(self._tensors[index])
        super()._put_in_force(index, assignment)
