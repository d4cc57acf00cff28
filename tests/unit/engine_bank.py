"""Both ends of a weight channel: an engine's adapters, and a writer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from benchmarks.distillation.whole_draft import DistilledDraft
from evospec.engine.adapters_config import AdaptersConfig, TokenLogConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.lora import lora_layout
from evospec.engine.online.adapters import Assignment, EagleAdapters
from evospec.engine.online.shared_file import SharedFile
from evospec.engine.online.weight_channel import WeightWriter
from evospec.engine.online.whole_draft import whole_layout
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.eagle_network import TorchEagleNetwork

DRAFT = Eagle3Config("tiny", 32, 2, 1, 16, 64, (0, 1, 2), 1e-5, 100, 4)


# In the channel's file.
FINGERPRINT, WORD, DIRECTORIES, BUFFERS = 24, 64, 128, 4096


class Bank:
    """The engine's end and the worker's. ``is_whole``: whole drafts are exchanged, not adapters."""

    def __init__(self, directory: Path, is_whole: bool = False, **options: object) -> None:
        options.setdefault("log", TokenLogConfig(control_share=0.0))
        self._is_whole = is_whole
        self.config = AdaptersConfig(enabled=True, shared_directory=directory, rank=4, num_slots=3, **options)
        self.draft = Eagle3(DRAFT).requires_grad_(False)
        self.start()
        self.layout = whole_layout(DRAFT, "base") if is_whole else lora_layout(DRAFT, 4, self.config.targets, "base")
        self.writer = WeightWriter(self.config.channel_path, self.layout)

    def start(self) -> None:
        """An engine, or another one."""
        self.engine: EagleAdapters
        if self._is_whole:
            self.engine = whole = DistilledDraft(self.config, self.draft, "base")
            whole.network = TorchEagleNetwork(self.draft, cast(RotaryEmbedding, None))  # nothing is computed with it
        else:
            self.engine = EagleAdapters(self.config, self.draft, "base")

    def publish(self, slot: int, key: str, value: float) -> int:
        return self.writer.publish(
            slot, key, {s.name: torch.full(s.shape, value, dtype=s.dtype) for s in self.layout.tensors}
        )

    def flip_bits(self, *slots: int) -> None:
        """Change a bit of what each slot's weights in force are."""
        file = SharedFile.open(self.config.channel_path)
        for slot in slots:
            place = BUFFERS + (2 * slot + self.writer.slots[slot].buffer) * self.layout.nbytes
            file.write(place, bytes([file.read(place, 1)[0] ^ 1]))

    def assign(self, *requests: Request) -> list[Assignment]:
        self.engine.refresh()
        self.engine.assign(requests)
        return [self.engine.assignment(request) for request in requests]

    def value(self, request: Request) -> float:
        """The number that all weights of a request's adapter are."""
        rows = self.engine.rows([request])
        assert rows is not None
        numbers = {float(v) for part in rows.parts for w in (part.a, part.b) for v in w[int(rows.slots[0])].flatten()}
        assert len(numbers) == 1
        return numbers.pop()


def request(name: str, tenant: str, domain: str | None = None) -> Request:
    return Request(name, b"", tenant, SamplingParams(max_tokens=1, seed=0), [1], domain=domain)
