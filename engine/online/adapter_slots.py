"""What the slots of an adapter bank hold in the engine, and how the draft computes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from engine.adapters_config import AdaptersConfig
from engine.models.eagle3 import Eagle3
from engine.models.lora import adapted_rows, lora_layout, whole_layout
from engine.online.weight_layout import WeightLayout
from engine.speculation.drafters.eagle_network import EagleNetwork
from kernels.batched_lora import LoraPart, LoraRows


class AdapterSlots(Protocol):
    """Weights of ``len(tensors)`` slots."""

    layout: WeightLayout
    """Of a slot, and of the weight channel."""
    tensors: Sequence[Mapping[str, torch.Tensor]]
    """Of each slot; what was published is copied into them."""
    num_bytes: int
    """Memory of it all."""

    def put_in_force(self, slot: int) -> None:
        """A slot's tensors were replaced; its requests draft with them from now on."""
        ...

    def withdraw(self, slot: int) -> None:
        """A slot's requests draft with the base from now on."""
        ...

    def rows(self, slots: Sequence[int]) -> LoraRows | None:
        """What each of a batch's tokens gains from its slot, -1: nothing; None: no token gains anything."""
        ...


class LoraSlots:
    """A low-rank adapter in each slot; a batch's tokens may have different ones.

    Args:
        config: number of slots, shape of an adapter.
        draft: the base draft.
        base: its fingerprint.
    """

    def __init__(self, config: AdaptersConfig, draft: Eagle3, base: str) -> None:
        self._device = draft.fc.weight.device
        self.layout = lora_layout(draft.config, config.rank, config.targets, base)
        stacks = {
            spec.name: torch.zeros(config.num_slots, *spec.shape, dtype=spec.dtype, device=self._device)
            for spec in self.layout.tensors
        }
        self._parts = []
        for target in config.targets:
            rows = adapted_rows(draft.config, target)
            a, b = stacks[f"{target}.a"], stacks[f"{target}.b"]
            self._parts.append(LoraPart(rows.start, rows.end, a, b, rows.matrix))
        self.tensors: Sequence[Mapping[str, torch.Tensor]] = [
            {name: stack[slot] for name, stack in stacks.items()} for slot in range(config.num_slots)
        ]
        self.num_bytes = config.num_slots * self.layout.nbytes

    def put_in_force(self, slot: int) -> None:
        pass  # the kernels read the slots' tensors themselves

    def withdraw(self, slot: int) -> None:
        pass  # no row names the slot any more

    def rows(self, slots: Sequence[int]) -> LoraRows | None:
        if max(slots) < 0:
            return None
        return LoraRows(torch.tensor(slots, dtype=torch.int32, device=self._device), self._parts)


class WholeSlot:
    """One slot for all weights of the draft, which take the place of its own: the draft changes for everybody at once.

    A baseline (full-parameter online distillation, arXiv 2310.07177). The base draft's weights are kept to return to.

    Args:
        draft: the base draft.
        base: its fingerprint.
        network: computes with them.
    """

    def __init__(self, draft: Eagle3, base: str, network: EagleNetwork) -> None:
        self._network = network
        self._base = {name: weight.detach().clone() for name, weight in draft.named_parameters()}
        self._is_base = True
        self.layout = whole_layout(draft.config, base)
        device = draft.fc.weight.device
        self.tensors: Sequence[Mapping[str, torch.Tensor]] = [
            {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in self.layout.tensors}
        ]
        self.num_bytes = self.layout.nbytes + sum(weight.nbytes for weight in self._base.values())

    def put_in_force(self, slot: int) -> None:
        self._network.load(self.tensors[slot])
        self._is_base = False

    def withdraw(self, slot: int) -> None:
        if not self._is_base:
            self._network.load(self._base)
            self._is_base = True

    def rows(self, slots: Sequence[int]) -> LoraRows | None:
        return None


def make_slots(config: AdaptersConfig, draft: Eagle3, base: str, network: EagleNetwork) -> AdapterSlots:
    """The slots that ``config.training.method`` needs."""
    if config.training.method == "osd":
        return WholeSlot(draft, base, network)
    return LoraSlots(config, draft, base)
