"""Weights through shared memory: whole versions only, whoever dies and wherever."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import stat
import time
import timeit
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from evospec.engine.online.adapter_control import MAX_KEY_BYTES
from evospec.engine.online.cuda_memory import HandleServer, receive_memory
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_channel import ChannelReplaced, WeightChannel, WeightWriter
from evospec.engine.online.weight_directory import MAX_VERSION, Slot
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout
from tests.killable_processes import processes
from tests.unit.interleaving import at_line, before_each_line, count_lines

SMALL = WeightLayout((TensorSpec("a", (5,), torch.float32), TensorSpec("b", (2, 3), torch.bfloat16)), "draft")
LARGE = WeightLayout((TensorSpec("a", (512, 512), torch.float32), TensorSpec("b", (257,), torch.int64)))
CODE = "/engine/online/"
KILLS = 60


def empty(layout: WeightLayout) -> dict[str, torch.Tensor]:
    return {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in layout.tensors}


def contents(layout: WeightLayout, version: int) -> dict[str, torch.Tensor]:
    """What ``publish_next`` publishes as ``version``."""
    return {spec.name: torch.full(spec.shape, version % 251, dtype=spec.dtype) for spec in layout.tensors}


def publish_next(writer: WeightWriter, layout: WeightLayout, slot: int = 0) -> int:
    expected = writer.version + 1
    version = writer.publish(slot, f"key-{slot}", contents(layout, expected))
    assert version == expected
    return version


def read_whole(channel: WeightChannel, tensors: dict[str, torch.Tensor], slot: int = 0) -> Slot:
    """Read a slot and check that all of it is of the version it says."""
    state = channel.read_into(slot, tensors)
    if state.key is not None:
        for name, tensor in contents(channel.layout, state.version).items():
            assert torch.equal(tensors[name], tensor)
    return state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def channel(path: Path) -> WeightChannel:
    return WeightChannel.create(path, SMALL, num_slots=3)


@pytest.fixture
def writer(path: Path, channel: WeightChannel) -> Iterator[WeightWriter]:
    writer = WeightWriter(path, SMALL)
    yield writer
    writer.close()


def test_each_slot_has_its_own_key_and_version(channel: WeightChannel, writer: WeightWriter) -> None:
    tensors = empty(SMALL)
    assert channel.poll() == 0
    assert channel.slots() == (Slot(),) * 3
    publish_next(writer, SMALL, 0)
    publish_next(writer, SMALL, 2)
    publish_next(writer, SMALL, 0)
    assert channel.poll() == 3
    assert [(slot.key, slot.version) for slot in channel.slots()] == [("key-0", 3), (None, 0), ("key-2", 2)]
    assert read_whole(channel, tensors, 2).version == 2
    assert read_whole(channel, tensors, 0).version == 3
    assert writer.clear(0) == 4
    assert channel.read_into(0, tensors) == Slot(None, 4, channel.slots()[0].buffer)
    assert torch.equal(tensors["a"], contents(SMALL, 3)["a"])  # an empty slot leaves them as they are


def test_copies_go_into_the_tensors_that_are_there(channel: WeightChannel, writer: WeightWriter) -> None:
    with torch.inference_mode():
        tensors = empty(SMALL)
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    publish_next(writer, SMALL)
    read_whole(channel, tensors)
    assert [tensor.data_ptr() for tensor in tensors.values()] == addresses


def test_a_look_costs_less_than_two_microseconds(channel: WeightChannel) -> None:
    assert min(timeit.repeat(channel.poll, number=1000, repeat=20)) / 1000 < 2e-6


def test_directory_has_room_for_the_longest_keys_and_versions(tmp_path: Path) -> None:
    channel = WeightChannel.create(tmp_path / "weights", SMALL, num_slots=40)
    writer = WeightWriter(tmp_path / "weights", SMALL, version=MAX_VERSION - 40)
    for slot in range(40):
        version = writer.publish(slot, f"{slot:02}" + "é" * (MAX_KEY_BYTES // 2 - 1), empty(SMALL))
    assert channel.poll() == version == MAX_VERSION
    assert {len((slot.key or "").encode()) for slot in channel.slots()} == {MAX_KEY_BYTES}
    channel.read_into(39, empty(SMALL))
    with pytest.raises(SharedMemoryError, match="no version after"):
        writer.clear(0)


def test_wrong_arguments_are_refused_and_change_nothing(channel: WeightChannel, writer: WeightWriter) -> None:
    publish_next(writer, SMALL)
    with pytest.raises(ValueError, match="another slot"):
        writer.publish(1, "key-0", empty(SMALL))
    with pytest.raises(ValueError, match="1 to 128 bytes"):
        writer.publish(1, "é" * 65, empty(SMALL))
    with pytest.raises(ValueError, match="expected the tensors"):
        writer.publish(1, "key", {})
    with pytest.raises(ValueError, match="b is torch"):
        channel.read_into(0, {**empty(SMALL), "b": torch.zeros(2, 3)})
    assert channel.poll() == 1


def test_layout_is_names_shapes_dtypes_and_base(path: Path, channel: WeightChannel) -> None:
    tensors = empty(SMALL)
    assert WeightLayout.of(dict(reversed(tensors.items())), "draft").fingerprint == SMALL.fingerprint
    others = [
        WeightLayout.of(tensors, "another draft"),
        WeightLayout.of({"a": tensors["a"], "c": tensors["b"]}, "draft"),
        WeightLayout.of({"a": tensors["a"], "b": tensors["b"].T}, "draft"),
        WeightLayout.of({"a": tensors["a"], "b": tensors["b"].half()}, "draft"),
    ]
    for other in others:
        with pytest.raises(SharedMemoryError, match="other weights"):
            WeightWriter(path, other)


def test_there_is_one_writer(path: Path, channel: WeightChannel, writer: WeightWriter) -> None:
    with pytest.raises(SharedMemoryError, match="another process writes"):
        WeightWriter(path, SMALL)
    writer.close()
    WeightWriter(path, SMALL).close()


def test_writer_that_dies_at_any_line_or_byte_changes_nothing(
    path: Path, channel: WeightChannel, writer: WeightWriter, tmp_path: Path
) -> None:
    publish_next(writer, SMALL, 0)
    publish_next(writer, SMALL, 1)
    images: list[bytes] = []
    before_each_line(CODE, lambda: images.append(path.read_bytes()), lambda: publish_next(writer, SMALL, 0))
    images.append(path.read_bytes())
    crashed = tmp_path / "crashed"
    versions = []
    for before, after in itertools.pairwise(images):
        # The word at 64 is stored at once; everything else could stop at any byte.
        changed = [i + 1 for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y and not 64 <= i < 71]
        for cut in [0, *changed]:
            crashed.write_bytes(after[:cut] + before[cut:])
            survivor = WeightChannel.attach(crashed, SMALL)
            assert read_whole(survivor, empty(SMALL), 1).version == 2
            versions.append(read_whole(survivor, empty(SMALL), 0).version)
            successor = WeightWriter(crashed, SMALL)
            assert publish_next(successor, SMALL, 0) > versions[-1]
            assert read_whole(survivor, empty(SMALL), 0).version == successor.version
            successor.close()
    assert versions == sorted(versions)
    assert versions.count(1) > 50
    assert set(versions) == {1, 3}


@pytest.mark.parametrize("publications", [1, 2, 3])
def test_reader_overtaken_at_any_line_gets_a_whole_version_or_nothing(
    channel: WeightChannel, writer: WeightWriter, publications: int
) -> None:
    def overtake() -> None:
        for _ in range(publications):
            publish_next(writer, SMALL)

    publish_next(writer, SMALL)
    for line in range(count_lines(CODE, lambda: channel.read_into(0, empty(SMALL)))):
        tensors = empty(SMALL)
        before = writer.version
        state = before_each_line(CODE, at_line(line, overtake), partial(read_whole, channel, tensors))
        assert before <= state.version <= writer.version


def test_reader_that_cannot_keep_up_says_so_and_leaves_the_tensors(
    channel: WeightChannel, writer: WeightWriter
) -> None:
    tensors = empty(SMALL)
    publish_next(writer, SMALL)

    def overtake() -> None:
        publish_next(writer, SMALL)

    with pytest.raises(SharedMemoryError, match="faster than it can be read"):
        before_each_line(CODE, overtake, lambda: channel.read_into(0, tensors))
    assert all(torch.equal(tensors[name], zeros) for name, zeros in empty(SMALL).items())
    read_whole(channel, tensors)


def damage(path: Path, start: int, end: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        piece = file.read(end - start)
        file.seek(start)
        file.write(bytes(byte ^ 0x5A for byte in piece))


# The first publication puts buffer 1 and directory 0 in force.
WORD, DIRECTORY, BUFFER = (64, 72), (136, 150), (4096 + 128, 4096 + 132)


@pytest.mark.parametrize("where", [WORD, DIRECTORY, BUFFER])
def test_damage_is_noticed_and_the_next_publication_repairs_it(
    path: Path, channel: WeightChannel, writer: WeightWriter, where: tuple[int, int]
) -> None:
    tensors = empty(SMALL)
    publish_next(writer, SMALL)
    assert channel.slots()[0].buffer == 1
    damage(path, *where)
    with pytest.raises(SharedMemoryError, match=r"damaged|wrong checksum"):
        channel.read_into(0, tensors)
    assert all(torch.equal(tensors[name], zeros) for name, zeros in empty(SMALL).items())
    assert publish_next(writer, SMALL) == 2
    assert channel.poll() == 2
    assert read_whole(channel, tensors).version == 2


@pytest.mark.parametrize("byte", range(0, 60, 4))
def test_damaged_header_is_noticed_and_a_new_channel_repairs_it(
    path: Path, channel: WeightChannel, writer: WeightWriter, byte: int
) -> None:
    tensors = empty(SMALL)
    publish_next(writer, SMALL)
    damage(path, byte, byte + 1)
    with pytest.raises(SharedMemoryError, match="header is damaged"):
        channel.read_into(0, tensors)
    with pytest.raises(SharedMemoryError, match="header is damaged"):
        WeightChannel.attach(path, SMALL)
    assert not writer.is_replaced()
    replacement = WeightChannel.create(path, SMALL, num_slots=3)
    assert writer.is_replaced()
    with pytest.raises(ChannelReplaced):
        publish_next(writer, SMALL)
    successor = WeightWriter(path, SMALL, version=writer.version)
    assert publish_next(successor, SMALL) == 2
    assert read_whole(replacement, tensors).version == 2


def test_no_channel_and_no_room_are_errors(tmp_path: Path) -> None:
    with pytest.raises(SharedMemoryError, match="No such file"):
        WeightChannel.attach(tmp_path / "none", SMALL)
    with pytest.raises(SharedMemoryError, match="cannot make"):
        WeightChannel.create(tmp_path / "none" / "weights", SMALL, 1)
    huge = WeightLayout((TensorSpec("a", (2**50,), torch.float32),))
    with pytest.raises(SharedMemoryError, match="cannot make"):
        WeightChannel.create(tmp_path / "huge", huge, 1)
    assert not list(tmp_path.iterdir())


def test_engine_that_comes_back_finds_the_versions(path: Path, channel: WeightChannel, writer: WeightWriter) -> None:
    publish_next(writer, SMALL)
    channel.close()
    returned = WeightChannel.create(path, SMALL, num_slots=3)
    assert read_whole(returned, empty(SMALL)).version == 1
    assert publish_next(writer, SMALL) == 2
    assert read_whole(returned, empty(SMALL)).version == 2


def test_engine_with_other_weights_goes_on_counting(path: Path, channel: WeightChannel, writer: WeightWriter) -> None:
    publish_next(writer, SMALL)
    other = WeightChannel.create(path, LARGE, num_slots=1)
    assert other.slots() == (Slot(),)
    with pytest.raises(ChannelReplaced):
        publish_next(writer, SMALL)
    assert publish_next(WeightWriter(path, LARGE), LARGE) == 2


def publish_until_killed(path: Path) -> None:
    torch.set_num_threads(1)
    writer = WeightWriter(path, LARGE)
    while True:
        publish_next(writer, LARGE, writer.version % 2)


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take very long while processes compete for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_writers_killed_at_random_moments(path: Path) -> None:
    """``KILLS`` writers of 1 MB versions, each killed some time after its first publications."""
    channel = WeightChannel.create(path, LARGE, num_slots=2)
    tensors = empty(LARGE)
    chance = random.Random(0)
    read: list[int] = []
    half_written = 0
    for _ in range(KILLS):
        before = channel.poll()
        process = processes.Process(target=publish_until_killed, args=(path,))
        process.start()
        deadline = time.monotonic() + 60
        while channel.poll() < before + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        end = time.monotonic() + chance.uniform(0, 0.06)
        while time.monotonic() < end:
            with suppress(SharedMemoryError):  # it may change faster than it can be read
                read.append(read_whole(channel, tensors, 0).version)
        kill(process)
        assert process.exitcode == -9
        assert channel.poll() >= before + 2
        last = [read_whole(channel, tensors, slot).version for slot in (0, 1)]
        assert sorted(last) == [channel.poll() - 1, channel.poll()]
        half_written += is_half_written(path, channel)
        read.append(last[0])
    assert read == sorted(read)
    assert len(read) > KILLS
    assert half_written > 0


def is_half_written(path: Path, channel: WeightChannel) -> bool:
    """Whether a buffer that is not in force holds pieces of two versions."""
    data = torch.frombuffer(bytearray(path.read_bytes()[4096:]), dtype=torch.uint8).view(4, LARGE.nbytes)
    idle = [LARGE.views(data[2 * slot + 1 - state.buffer]) for slot, state in enumerate(channel.slots())]
    return any(views["a"].min() != views["a"].max() for views in idle)


def serve_until_killed(path: Path) -> None:
    torch.set_num_threads(1)
    channel = WeightChannel.create(path, LARGE, num_slots=2)
    tensors = empty(LARGE)
    while True:
        channel.read_into(0, tensors)


@pytest.mark.usefixtures("one_thread")
def test_engines_killed_at_random_moments_do_not_disturb_the_writer(path: Path) -> None:
    WeightChannel.create(path, LARGE, num_slots=2)
    writer = WeightWriter(path, LARGE)
    chance = random.Random(0)
    for _ in range(20):
        engine = processes.Process(target=serve_until_killed, args=(path,))
        engine.start()
        end = time.monotonic() + chance.uniform(0, 0.05)
        while time.monotonic() < end:
            publish_next(writer, LARGE)
        kill(engine)
    assert read_whole(WeightChannel.create(path, LARGE, num_slots=2), empty(LARGE)).version == writer.version


def test_device_memory_that_cannot_be_shared_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(SharedMemoryError, match="No such file"):
        receive_memory(path)
    server = HandleServer(torch.zeros(8, dtype=torch.uint8), path)  # of a CPU: there is no handle to give
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for _ in range(2):
        with pytest.raises(SharedMemoryError, match="no device memory"):
            receive_memory(path)
    server.close()
    with pytest.raises(SharedMemoryError, match="refused"):
        receive_memory(path)


def publish_on_cuda(path: Path, count: int) -> None:
    writer = WeightWriter(path, LARGE)
    for _ in range(count):
        version = writer.version + 1
        writer.publish(0, "key", {name: t.cuda() for name, t in contents(LARGE, version).items()})
    time.sleep(600)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_outlives_a_killed_writer(path: Path) -> None:
    channel = WeightChannel.create(path, LARGE, num_slots=2, device=torch.device("cuda"))
    tensors = {name: tensor.cuda() for name, tensor in empty(LARGE).items()}
    for round_ in range(1, 4):
        process = multiprocessing.get_context("spawn").Process(target=publish_on_cuda, args=(path, 3))
        process.start()
        deadline = time.monotonic() + 120
        while channel.poll() < 3 * round_ and time.monotonic() < deadline:
            time.sleep(0.01)
        kill(process)
        assert channel.read_into(0, tensors).version == 3 * round_
        for name, tensor in contents(LARGE, 3 * round_).items():
            assert torch.equal(tensors[name].cpu(), tensor)
    channel.close()
