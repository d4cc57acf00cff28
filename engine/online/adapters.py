"""The adapters of an EAGLE-3 draft in the engine: taken from the weight channel, given to the requests they are for."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import structlog
import torch

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.models.config import ModelError
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.lora import adapted_rows, lora_layout
from evospec.engine.online.adapter_control import adapter_key
from evospec.engine.online.shared_file import SharedMemoryError, make_private_directory
from evospec.engine.online.weight_channel import NonFiniteWeights, WeightChannel
from evospec.engine.online.weight_directory import Slot
from evospec.engine.online.weight_layout import WeightLayout
from evospec.engine.request import Request
from evospec.kernels.batched_lora import LoraPart, LoraRows
from evospec.kernels.upload import upload

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0
_MOST_BATCHES = 64
"""Whose rows are kept as the kernels read them: those of one sequence are the same in most of its steps."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who drafts for a request: the adapter in a slot, at a version; slot -1: the base draft, without key."""

    slot: int
    key: str | None
    version: int


BASE = Assignment(-1, None, 0)


class EagleAdapters:
    """Slots of low-rank adapters that a worker fills, and which of them drafts for whom.

    ``refresh`` and ``assign`` come once a step, before anything is drafted. Between them and the next step no weight
    changes, so the version of an assignment is the one that drafted. A batch's tokens may have different adapters.

    Args:
        config: shape of an adapter, how many slots there are, who shares one.
        draft: the base draft.
        base: its fingerprint.

    Raises:
        ModelError: the channel cannot be made.
    """

    trains_fusion = False
    """Whether training changes how the draft fuses the target's features, and so wants them as they were."""
    records_output = False
    """Whether training wants the output of the target's last layer, too: behind the features."""

    def __init__(self, config: AdaptersConfig, draft: Eagle3, base: str) -> None:
        self.config, self._device = config, draft.fc.weight.device
        layout, self._tensors = self._make_slots(draft, base)
        num_slots = len(self._tensors)
        self.layout, self.num_bytes = layout.name, num_slots * layout.nbytes
        try:
            make_private_directory(config.shared_directory)
            self._channel = WeightChannel.create(config.channel_path, layout, num_slots, self._device)
        except SharedMemoryError as error:
            raise ModelError(f"alignment: no weight channel: {error}") from error
        self._in_force = [BASE] * num_slots
        self._versions = [0] * num_slots
        """Of what each slot held when it was read."""
        self._by_key: dict[str, Assignment] = {}
        self._keys: dict[Request, str | None] = {}
        """Of each request, whose adapters draft for it; None: it keeps the base draft, to compare with."""
        self._assigned: dict[Request, Assignment] = {}
        """Of each request, who drafted last."""
        self._seen, self._look_at = -1, 0.0
        """Version of the channel at the last look that found it sound, and when to look again."""
        self._is_damaged = False
        """Whether something could not be read at the last look."""
        self._rows_of = functools.lru_cache(_MOST_BATCHES)(self._make_rows)
        self.num_loads = 0
        self.num_failed_loads = 0

    @property
    def version(self) -> int:
        """Of the channel, as far as it was read."""
        return max(self._seen, 0)

    @property
    def versions(self) -> dict[str, int]:
        """Of the adapters in force, by key."""
        return {key: assignment.version for key, assignment in self._by_key.items()}

    def refresh(self) -> None:
        """Take over what was published since the last call, and see once a second that the channel is sound.

        What cannot be read is tried again a second later. If it is still damaged then, nobody else will mend it before
        the next publication, or ever: another channel takes its place.
        """
        now = time.monotonic()
        if now < self._look_at and (self._is_damaged or not self._has_changed()):
            return
        self._look_at = now + _LOOK_SECONDS
        was_damaged, self._is_damaged = self._is_damaged, not self._take_over()
        if was_damaged and self._is_damaged:
            self._replace()

    def assign(self, requests: Sequence[Request]) -> None:
        """Decide who drafts for these requests in this step."""
        for request in requests:
            key = self._key(request)
            self._assigned[request] = BASE if key is None else self._by_key.get(key, BASE)

    def rows(self, requests: Iterable[Request]) -> LoraRows | None:
        """What the tokens of a batch are adapted by, given whose each is; None: nothing."""
        if not self._by_key:
            return None
        slots = self.slots_of(requests)
        return None if max(slots) < 0 else self._rows_of(tuple(slots))

    def _make_rows(self, slots: tuple[int, ...]) -> LoraRows:
        [on_device] = upload(self._device, np.array(slots, np.int32))
        return LoraRows(on_device, self.parts)

    def slots_of(self, requests: Iterable[Request]) -> list[int]:
        """Whose adapter drafts for each; -1: the base draft does."""
        return [self.assignment(request).slot for request in requests]

    def assignment(self, request: Request) -> Assignment:
        """Who drafted last for a request."""
        return self._assigned.get(request, BASE)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self._keys.pop(request, None)
        self._assigned.pop(request, None)

    def is_control(self, request: Request) -> bool:
        """Whether a request keeps the base draft whatever there is, so that adapters have something to compare with."""
        return self._key(request) is None

    def _make_slots(self, draft: Eagle3, base: str) -> tuple[WeightLayout, Sequence[Mapping[str, torch.Tensor]]]:
        """The layout of a slot, and of the weight channel; and each slot's tensors, which the kernels read."""
        config = self.config
        layout = lora_layout(draft.config, config.rank, config.targets, base)
        stacks = {
            spec.name: torch.zeros(config.num_slots, *spec.shape, dtype=spec.dtype, device=self._device)
            for spec in layout.tensors
        }
        self.parts = []
        for target in config.targets:
            rows = adapted_rows(draft.config, target)
            a, b = stacks[f"{target}.a"], stacks[f"{target}.b"]
            self.parts.append(LoraPart(rows.start, rows.end, a, b, rows.matrix))
        return layout, [{name: stack[slot] for name, stack in stacks.items()} for slot in range(config.num_slots)]

    def _key(self, request: Request) -> str | None:
        if request not in self._keys:
            key = adapter_key(self.config.key_scope, request.tenant, request.domain)
            digest = blake2b(request.request_id.encode(), digest_size=4, person=b"control").digest()
            is_control = int.from_bytes(digest) < self.config.log.control_share * 2**32
            self._keys[request] = None if is_control else key
        return self._keys[request]

    def _has_changed(self) -> bool:
        """Whether something was published since the last look, or nobody can tell."""
        try:
            return self._channel.poll() != self._seen
        except SharedMemoryError:
            return True

    def _take_over(self) -> bool:
        """Load the slots that changed; whether all could be read, and the channel is where a worker looks for it."""
        try:
            if self._channel.is_replaced():
                raise SharedMemoryError(f"{self.config.channel_path} is gone, or another's")
            version = self._channel.poll()
            slots = self._channel.slots()
        except SharedMemoryError as error:
            self._note_failure(error)
            return False
        changed = [index for index, slot in enumerate(slots) if slot.version != self._versions[index]]
        are_loaded = [self._load(index, slots[index]) for index in changed]
        self._by_key = {one.key: one for one in self._in_force if one.key is not None}
        if not all(are_loaded):
            return False
        self._seen = version
        return True

    def _replace(self) -> None:
        """Make an empty channel: the worker finds it within a second, and publishes again what should be in force."""
        try:
            make_private_directory(self.config.shared_directory)
            self._channel = self._channel.replace(max(self._versions))
        except SharedMemoryError as error:
            log.warning("no other weight channel", reason=str(error))
            return
        log.warning("damaged or lost weight channel replaced", version=max(self._versions))
        # A key may come back in another slot: until then it has the base draft.
        for index in range(len(self._in_force)):
            self._put_in_force(index, BASE)
        self._versions = [0] * len(self._in_force)
        self._by_key = {}
        self._is_damaged = False

    def _load(self, index: int, slot: Slot) -> bool:
        """Copy a slot's weights in place; whether they could be read.

        Its key goes on with what it had if they could not, or should not be drafted with.
        """
        if slot.key != self._in_force[index].key:
            self._put_in_force(index, BASE)
        try:
            state = self._channel.read_into(index, self._tensors[index])
        except NonFiniteWeights as error:
            self._note_failure(error)
            self._versions[index] = slot.version
            return True
        except SharedMemoryError as error:
            self._note_failure(error)
            return False
        self._versions[index] = state.version
        self._put_in_force(index, BASE if state.key is None else Assignment(index, state.key, state.version))
        self.num_loads += 1
        return True

    def _put_in_force(self, index: int, assignment: Assignment) -> None:
        """A slot's requests draft with its tensors, which were replaced, or with the base from now on."""
        self._in_force[index] = assignment

    def _note_failure(self, error: SharedMemoryError) -> None:
        self.num_failed_loads += 1
        log.warning("adapters cannot be read", reason=str(error))
