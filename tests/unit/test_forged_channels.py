"""Channels and rings that somebody else has written to: nobody ends by them, and what was lost comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.attack import channel_bytes, forge_channel
from evospec.adapters.alignment.publisher import AdapterPublisher
from evospec.adapters.alignment.store import AdapterStore
from evospec.engine.online import adapters as eagle_adapters
from evospec.engine.online.adapters import BASE
from evospec.engine.online.feature_ring import FeatureRing, FeatureRingReader
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_channel import NonFiniteWeights, WeightChannel, WeightWriter
from tests.unit.engine_bank import Bank, request

LAW, ACME = request("1", "law"), request("2", "acme")
ROUNDS = 8


class Served:
    """An engine and a worker whose key is ``law``; forgeries name ``acme``, for whom nobody has trained anything."""

    def __init__(self, directory: Path) -> None:
        self.bank = Bank(directory / "shared")
        self.bank.writer.close()
        self.path = self.bank.config.channel_path
        self.worker = AdapterPublisher(self.path, self.bank.layout, AdapterStore(directory / "state", self.bank.layout))
        self.publish(1.0)
        self.bank.assign(LAW, ACME)
        assert self.bank.value(LAW) == 1.0

    def publish(self, value: float) -> None:
        self.worker.attach()
        layout = self.bank.layout
        self.worker.publish("law", {s.name: torch.full(s.shape, value, dtype=s.dtype) for s in layout.tensors})

    def recovers(self) -> bool:
        """Whether the worker's next weights come into force within some looks; nothing forged ever may."""
        for _ in range(ROUNDS):
            assignments = self.bank.assign(LAW, ACME)
            assert assignments[1] == BASE
            if assignments[0] != BASE and self.bank.value(LAW) == 2.0:
                return True
            self.publish(2.0)
        return False


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(forge_channel, "_CHURN_SECONDS", 0.02)
    return Served(tmp_path)


@pytest.mark.parametrize("mode", forge_channel.MODES)
def test_a_running_engine_survives_a_forged_channel(served: Served, mode: str) -> None:
    forge_channel.forge(served.path, mode)
    assert served.recovers()


@pytest.mark.parametrize("mode", forge_channel.MODES)
def test_an_engine_starts_on_a_forged_channel(served: Served, mode: str) -> None:
    forge_channel.forge(served.path, mode)
    served.bank.start()
    assert served.recovers()


@pytest.mark.parametrize("at_start", [False, True])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_an_engine_survives_any_bytes(at_start: bool, seed: int) -> None:
    """Somebody who may write the file may also forge the last version, after which there is none."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as directory:
        patch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
        served = Served(Path(directory))
        channel_bytes.damage_channel(served.path, Random(seed))
        if at_start:
            served.bank.start()
        for value in (2.0, 3.0, 4.0):
            served.bank.assign(LAW, ACME)
            served.publish(value)


def test_any_bytes_of_channel_and_ring_are_what_was_published_or_an_error() -> None:
    chance, counts = Random(0), Counter[str]()
    for _ in range(300):
        channel_bytes.damage_one_of_each(chance, counts)
    assert (counts["unexpected_errors"], counts["wrong_weights"]) == (0, 0)
    assert 0 < counts["channels_refused"] < counts["channels"]
    assert 0 < counts["rings_refused"] < counts["rings"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_refused_and_others_go_on(served: Served, number: float) -> None:
    bank, clinic = served.bank, request("3", "clinic")
    served.worker.close()
    writer = WeightWriter(served.path, bank.layout, served.worker._store.channel_version)
    for slot, key in ((0, "law"), (1, "clinic")):
        tensors = {s.name: torch.full(s.shape, 5.0, dtype=s.dtype) for s in bank.layout.tensors}
        if key == "law":
            list(tensors.values())[-1].view(-1)[-1] = number
        writer.publish(slot, key, tensors)
    failed = bank.engine.num_failed_loads
    for _ in range(3):  # refused once: what was published cannot get better
        bank.assign(LAW, clinic)
        assert (bank.value(LAW), bank.value(clinic)) == (1.0, 5.0)
    assert bank.engine.num_failed_loads == failed + 1
    assert not writer.is_replaced()
    with pytest.raises(NonFiniteWeights, match="'law'"):
        WeightChannel.attach(served.path, bank.layout).read_into(0, tensors)


def test_an_earlier_version_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    path, layout = tmp_path / "weights", channel_bytes.LAYOUT
    channel, writer = WeightChannel.create(path, layout, 2), WeightWriter(path, layout)
    tensors = {spec.name: torch.ones(spec.shape, dtype=spec.dtype) for spec in layout.tensors}
    writer.publish(0, "key", tensors)
    image = path.read_bytes()
    writer.publish(0, "key", tensors)
    assert channel.slots()[0].version == 2
    path.write_bytes(image)
    with pytest.raises(SharedMemoryError, match="damaged"):
        channel.slots()


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def clear_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(64))


@pytest.mark.parametrize("damage", [truncate, append, clear_header, Path.unlink])
def test_a_damaged_ring_is_lost_and_the_next_one_can_be_read(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "ring"
    ring, rows = FeatureRing(path, 1024, 8), torch.ones(4, 8)
    reader = FeatureRingReader(path)
    assert not ring.is_lost()
    damage(path)
    ring.write(rows)
    assert ring.is_lost()
    slot, generation = FeatureRing(path, 1024, 8).write(rows)
    references = torch.arange(slot, slot + 4), torch.full((4,), generation)
    assert reader.read(*references)[1].all()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "weights"
    make(path)
    with pytest.raises(SharedMemoryError):
        WeightChannel.attach(path, channel_bytes.LAYOUT)
    with pytest.raises(SharedMemoryError):
        FeatureRingReader(path)
