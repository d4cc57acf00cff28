"""The engine's end of the adapter bank: which adapter drafts for whom, whatever becomes of the channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.adapters_config import AdaptersConfig, LogConfig, TrainingConfig
from engine.ipc.weight_layout import WeightLayout
from engine.ipc.weight_writer import WeightWriter
from engine.messages import SamplingParams
from engine.models.config import ModelError
from engine.models.eagle3 import Eagle3Config
from engine.models.lora import lora_layout
from engine.request import Request
from engine.spec import eagle_adapters
from engine.spec.eagle_adapters import BASE, Assignment, EagleAdapters
from engine.spec.entries import Piece

DRAFT = Eagle3Config("tiny", 32, 2, 1, 16, 64, (0, 1, 2), 1e-5, 100, 4)
CPU = torch.device("cpu")


class Bank:
    """The engine's end and the worker's."""

    def __init__(self, directory: Path, **options: object) -> None:
        options.setdefault("log", LogConfig(control_share=0.0))
        self.config = AdaptersConfig(enabled=True, shared_directory=directory, rank=4, num_slots=3, **options)  # type: ignore[arg-type]
        self.engine = EagleAdapters(self.config, DRAFT, "base", CPU)
        self.layout: WeightLayout = lora_layout(DRAFT, 4, self.config.targets, "base")
        self.writer = WeightWriter(self.config.channel_path, self.layout)

    def publish(self, slot: int, key: str, value: float) -> int:
        return self.writer.publish(
            slot, key, {s.name: torch.full(s.shape, value, dtype=s.dtype) for s in self.layout.tensors}
        )

    def assign(self, *requests: Request) -> list[Assignment]:
        self.engine.refresh()
        self.engine.assign(requests)
        return [self.engine.assigned(request.request_id) for request in requests]

    def value(self, request: Request) -> float:
        """The number that all weights of a request's adapter are."""
        rows = self.engine.rows([Piece(0, [1], 0, [], request.request_id)])
        assert rows is not None
        numbers = {float(v) for part in rows.parts for w in (part.a, part.b) for v in w[int(rows.slots[0])].flatten()}
        assert len(numbers) == 1
        return numbers.pop()


def request(name: str, tenant: str, domain: str | None = None) -> Request:
    return Request(name, b"", tenant, SamplingParams(max_tokens=1, seed=0), [1], domain=domain)


def test_each_request_drafts_with_the_adapter_of_its_key(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    law, clinic, other = request("1", "law"), request("2", "clinic"), request("3", "other")
    assert bank.assign(law, clinic, other) == [BASE] * 3
    assert bank.engine.rows([Piece(0, [1, 2], 0, [], "1")]) is None
    first, second = bank.publish(2, "law", 1.0), bank.publish(0, "clinic", 2.0)
    assert bank.assign(law, clinic, other) == [Assignment(2, "law", first), Assignment(0, "clinic", second), BASE]
    assert (bank.value(law), bank.value(clinic)) == (1.0, 2.0)
    rows = bank.engine.rows([Piece(0, [1, 2], 0, [], "3"), Piece(0, [1], 0, [], "2"), Piece(4, [1, 2], 0, [], "1")])
    assert rows is not None
    assert rows.slots.tolist() == [-1, -1, 0, 2, 2]
    assert bank.engine.versions == {"law": first, "clinic": second}


def test_new_versions_take_the_place_of_old_ones_and_slots_can_be_emptied(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    law = request("1", "law")
    bank.publish(0, "law", 1.0)
    bank.assign(law)
    version = bank.publish(0, "law", 3.0)
    assert bank.value(law) == 1.0  # not before the next step
    assert bank.assign(law) == [Assignment(0, "law", version)]
    assert bank.value(law) == 3.0
    bank.writer.clear(0)
    assert bank.assign(law) == [BASE]
    version = bank.publish(0, "clinic", 4.0)
    assert bank.assign(law, request("2", "clinic")) == [BASE, Assignment(0, "clinic", version)]


def test_domains_have_their_own_where_the_key_says_so(tmp_path: Path) -> None:
    bank = Bank(tmp_path, key_scope="tenant+domain")
    version = bank.publish(0, "law/contracts", 1.0)
    requests = request("1", "law", "contracts"), request("2", "law"), request("3", "clinic", "contracts")
    assert bank.assign(*requests) == [Assignment(0, "law/contracts", version), BASE, BASE]


def test_control_requests_keep_the_base_draft(tmp_path: Path) -> None:
    bank = Bank(tmp_path, log=LogConfig(control_share=0.2))
    bank.publish(0, "law", 1.0)
    requests = [request(str(number), "law") for number in range(1000)]
    for one, assignment in zip(requests, bank.assign(*requests), strict=True):
        assert (assignment == BASE) == bank.engine.is_control(one)
    assert 150 < sum(map(bank.engine.is_control, requests)) < 250


def test_damaged_weights_change_nothing_and_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle_adapters, "_RETRY_SECONDS", 0.0)
    bank = Bank(tmp_path)
    law, clinic, other = request("1", "law"), request("2", "clinic"), request("3", "other")
    good = bank.publish(0, "law", 1.0)
    bank.publish(1, "clinic", 5.0)
    bank.assign(law)
    bank.publish(0, "law", 2.0)
    bank.publish(1, "other", 6.0)
    healthy = bank.publish(2, "healthy", 7.0)
    buffers = bank.engine._channel.buffers._memory
    damaged = [2 * slot + bank.writer.slots[slot].buffer for slot in (0, 1)]
    buffers[damaged, 0] ^= 1
    expected = [Assignment(0, "law", good), BASE, BASE, Assignment(2, "healthy", healthy)]
    assert bank.assign(law, clinic, other, request("4", "healthy")) == expected
    assert bank.value(law) == 1.0
    assert bank.engine.num_failed_loads == 2
    buffers[damaged, 0] ^= 1
    assert bank.assign(law)[0].version > good
    assert bank.value(law) == 2.0
    assert bank.assign(other)[0].key == "other"


def test_an_engine_that_comes_back_finds_its_adapters(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    version = bank.publish(1, "law", 1.0)
    bank.engine = EagleAdapters(bank.config, DRAFT, "base", CPU)
    assert bank.assign(request("1", "law")) == [Assignment(1, "law", version)]


@pytest.mark.parametrize("options", [{"targets": ("q", "o")}, {"training": TrainingConfig(method="osd")}])
def test_what_the_engine_cannot_apply_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="q, k and v only"):
        Bank(tmp_path, **options)
