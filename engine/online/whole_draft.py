"""A draft whose weights come whole from the worker: one that grows from the traffic of a model without a draft."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from evospec.engine.models.config import ModelSpec
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import Eagle3Config, recorded_layers
from evospec.engine.models.weights import WeightSource
from evospec.engine.online.adapters import BASE, Assignment, EagleAdapters
from evospec.engine.online.weight_layout import WeightLayout
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork
from evospec.kernels.batched_lora import LoraRows


def whole_layout(config: Eagle3Config, base: str) -> WeightLayout:
    """Layout (bf16) of a weight channel for all weights of a draft, by their names in ``Eagle3``."""
    with torch.device("meta"):
        weights = dict(Eagle3(config).named_parameters())
    return WeightLayout.of({name: weight.bfloat16() for name, weight in weights.items()}, base)


def growing_config(spec: ModelSpec, target: str) -> Eagle3Config:
    """The shape that `evospec train-draft` gives a draft too: a layer as large as the target's."""
    return Eagle3Config.for_target(spec, target, recorded_layers(spec)[:-1], spec.intermediate_size)


def growing_fingerprint(source: WeightSource, spec: ModelSpec) -> str:
    """Names the target, by its shape, its norm and the matrices of its last layer: hexadecimal.

    What has grown for another model, a fine-tune of the same name included, is not taken over. Fine-tuning by adapters
    often changes only some of a layer's matrices.
    """
    digest = hashlib.sha256(repr(spec).encode())
    names = [f"self_attn.{name}_proj" for name in "qkvo"]
    if spec.experts is None:
        names += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for name in ("model.norm", *(f"model.layers.{spec.num_layers - 1}.{name}" for name in names)):
        digest.update(source.dequantized(f"{name}.weight").numpy().tobytes())
    return digest.hexdigest()


class WholeDraft(EagleAdapters):
    """One slot for all weights of a draft. They draft for the slot's key; for everybody else there is no draft."""

    trains_fusion = True
    records_output = True
    network: EagleNetwork
    """Computes with the weights."""

    def rows(self, requests: object) -> LoraRows | None:
        """None: nothing is added to the weights."""
        return None

    def find_draft(self, requests: Sequence[Request]) -> list[bool]:
        """Take over what was published, and say for which of a step's decoding requests there is a draft."""
        self.refresh()
        self.assign(requests)
        return [self.assignment(request) != BASE for request in requests]

    def _make_slots(self, draft: Eagle3, base: str) -> tuple[WeightLayout, Sequence[Mapping[str, torch.Tensor]]]:
        layout = whole_layout(draft.config, base)
        return layout, [
            {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=self._device) for spec in layout.tensors}
        ]

    def _put_in_force(self, index: int, assignment: Assignment) -> None:
        if assignment != BASE:
            self.network.load(self._tensors[index])
        super()._put_in_force(index, assignment)
