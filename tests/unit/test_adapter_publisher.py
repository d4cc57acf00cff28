"""Publications in the engine's slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evospec.adapters.alignment.publisher import AdapterPublisher
from evospec.adapters.alignment.store import AdapterStore
from evospec.engine.online.weight_channel import WeightChannel, WeightWriter
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout

LAYOUT = WeightLayout((TensorSpec("a", (4,), torch.float32),), "draft")
WEIGHTS = {"a": torch.ones(4)}


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_no_version_is_given_twice_though_worker_and_channel_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies when its publication is in force and nothing else is done, and the machine with it."""
    path = tmp_path / "weights"
    store = AdapterStore(tmp_path / "state", LAYOUT)
    channel = WeightChannel.create(path, LAYOUT, num_slots=1)
    publisher = AdapterPublisher(path, LAYOUT, store)
    assert publisher.attach()
    assert publisher.publish("key", WEIGHTS) == 1
    publish = WeightWriter.publish

    def publish_and_die(*arguments: object) -> int:
        publish(*arguments)  # type: ignore[arg-type]
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(WeightWriter, "publish", publish_and_die)
        with pytest.raises(Killed):
            publisher.publish("key", WEIGHTS)
    assert channel.poll() == 2
    publisher.close()
    path.unlink()
    WeightChannel.create(path, LAYOUT, num_slots=1)
    successor = AdapterPublisher(path, LAYOUT, AdapterStore(tmp_path / "state", LAYOUT))
    assert successor.attach()
    assert successor.publish("key", WEIGHTS) == 3


def test_a_full_disk_keeps_nothing_bad_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: AdapterStore, version: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "weights"
    channel = WeightChannel.create(path, LAYOUT, num_slots=1)
    publisher = AdapterPublisher(path, LAYOUT, AdapterStore(tmp_path / "state", LAYOUT))
    assert publisher.attach()
    assert publisher.publish("key", WEIGHTS) == 1
    monkeypatch.setattr(AdapterStore, "save_channel_version", fail)
    with pytest.raises(OSError, match="space"):
        publisher.publish("key", WEIGHTS)
    assert publisher.publish("key", None) == 0
    assert [slot.key for slot in channel.slots()] == [None]
