"""Random bytes in weight channels and feature rings, with right checksums and without, in files of the wrong size.

Whoever uses them gets what was published, or ``SharedMemoryError``. Needs no server.
"""

from __future__ import annotations

import os
import random
import struct
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from benchmarks.attack.bars import exactly
from benchmarks.attack.forge_channel import Channel
from evospec.engine.online.feature_ring import FeatureRing, FeatureRingReader
from evospec.engine.online.shared_file import SharedMemoryError
from evospec.engine.online.weight_channel import WeightChannel, WeightWriter
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout

BARS = {"unexpected_errors": exactly(0), "wrong_weights": exactly(0)}

LAYOUT = WeightLayout((TensorSpec("a", (33,), torch.float32), TensorSpec("b", (5, 7), torch.bfloat16)), "draft")
NUM_SLOTS = 3
_CAPACITY, _WIDTH = 8, 6
_HEADER, _RING_HEADER, _CRC = struct.Struct("<8sIIQ32s"), struct.Struct("<8sII"), struct.Struct("<I")
_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 9, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
_KEYS = (None, "", "acme", "key-0", "key-1", "é" * 64, "a" * 129)


def run(seconds: float, seed: int) -> dict[str, float]:
    """Damage new files for some seconds; what came of their use, in counts."""
    chance, counts = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        damage_one_of_each(chance, counts)
    names = ("channels", "channels_refused", "weights_read", "wrong_weights", "rings", "rings_refused")
    return {name: counts[name] for name in (*names, "unexpected_errors")}


def damage_one_of_each(chance: random.Random, counts: Counter[str]) -> None:
    """Make a channel and a ring, damage them, use them, and count what came of it."""
    with tempfile.TemporaryDirectory(prefix="evospec-attack-") as directory:
        _try_channel(Path(directory) / "channel", chance, counts)
        _try_ring(Path(directory) / "ring", chance, counts)


def _try_channel(path: Path, chance: random.Random, counts: Counter[str]) -> None:
    """Damage a channel that is in use; use it on, attach to it anew, and start another engine and writer on it."""
    channel, writer = WeightChannel.create(path, LAYOUT, NUM_SLOTS), WeightWriter(path, LAYOUT)
    for number in range(chance.randrange(1, 6)):
        _publish(writer, number % NUM_SLOTS)
    channel.slots()
    damage_channel(path, chance)
    uses: list[Callable[[], None]] = [
        lambda: _read_all(channel, counts),
        lambda: _publish(writer, 1),
        lambda: _read_all(channel, counts),
        lambda: _read_all(WeightChannel.attach(path, LAYOUT), counts),
        lambda: _read_all(WeightChannel.create(path, LAYOUT, NUM_SLOTS), counts),
    ]
    counts["channels"] += 1
    _use("channels", uses, counts)
    writer.close()
    channel.close()


def _try_ring(path: Path, chance: random.Random, counts: Counter[str]) -> None:
    """The same with a ring."""
    ring = FeatureRing(path, _CAPACITY, _WIDTH)
    rows = torch.ones(3, _WIDTH)
    slot, generation = ring.write(rows)
    reader = FeatureRingReader(path)
    damage_ring(path, chance)
    slots = torch.tensor([slot, slot + 1, slot + 2, -1, 2**40, _CAPACITY])
    generations = torch.full((6,), generation)
    uses: list[Callable[[], object]] = [
        lambda: reader.read(slots, generations),
        lambda: ring.write(rows),
        lambda: reader.read(slots, generations),
        lambda: FeatureRingReader(path).read(slots, generations),
        lambda: FeatureRing(path, _CAPACITY, _WIDTH).close(),
    ]
    counts["rings"] += 1
    _use("rings", uses, counts)
    ring.close()


def _use(what: str, uses: list[Callable[[], object]] | list[Callable[[], None]], counts: Counter[str]) -> None:
    refused = False
    for use in uses:
        try:
            use()
        except SharedMemoryError:
            refused = True
        except Exception:
            counts["unexpected_errors"] += 1
            traceback.print_exc()
    counts[f"{what}_refused"] += refused


def _publish(writer: WeightWriter, slot: int) -> None:
    """All numbers of a version are equal."""
    tensors = {spec.name: torch.full(spec.shape, writer.version % 100, dtype=spec.dtype) for spec in LAYOUT.tensors}
    writer.publish(slot, f"key-{slot}", tensors)


def _read_all(channel: WeightChannel, counts: Counter[str]) -> None:
    for slot, state in enumerate(channel.slots()):
        tensors = {spec.name: torch.full(spec.shape, -1, dtype=spec.dtype) for spec in LAYOUT.tensors}
        channel.read_into(slot, tensors)
        if state.key is not None:
            counts["weights_read"] += 1
            values = {float(value) for tensor in tensors.values() for value in tensor.flatten()}
            counts["wrong_weights"] += len(values) != 1


def damage_channel(path: Path, chance: random.Random) -> None:
    """Damage the weight channel at ``path`` in one to three ways."""
    ways = (_forge_slots, _forge_directory, _replay, _flip, _forge_header, _resize)
    for number in sorted(
        chance.choices(range(len(ways)), k=chance.choice((1, 1, 2, 3)))
    ):  # those last that hinder the others
        damage = ways[number]
        with suppress(OSError, ValueError, IndexError, OverflowError, struct.error, msgspec.MsgspecError):
            channel = Channel(path)
            try:
                damage(channel, chance)
            finally:
                channel.bytes.close()
                os.close(channel.descriptor)


def _forge_slots(channel: Channel, chance: random.Random) -> None:
    slots = channel.slots()
    for _ in range(chance.randrange(1, 3)):
        slot, field = chance.choice(slots), chance.randrange(4)
        known = chance.choice(channel.slots())[field]
        slot[field] = chance.choice((known, chance.choice(_KEYS if field == 0 else _NUMBERS)))
    count = chance.choice((len(slots), len(slots), len(slots) - 1, len(slots) + 1))
    version = chance.choice((channel.version + 1, channel.version + 1, chance.choice(_NUMBERS)))
    channel.commit(msgspec.msgpack.encode([version, (slots + slots)[:count]]))


def _forge_directory(channel: Channel, chance: random.Random) -> None:
    size = chance.randrange(channel.directory_size - 8)
    bad_text = b"\x92\x01\x93" + b"\x94\xa2\xff\xfe\x01\x00\x00" * NUM_SLOTS
    channel.commit(chance.choice((chance.randbytes(size), b"\x91" * size, b"\x81" * size, bad_text)))


def _forge_header(channel: Channel, chance: random.Random) -> None:
    fields = list(_HEADER.unpack_from(channel.bytes))
    field = chance.randrange(1, 4)
    fields[field] = chance.choice([number for number in _NUMBERS if 0 <= number < 2 ** (64 if field == 3 else 32)])
    header = _HEADER.pack(*fields)
    channel.bytes[: len(header) + _CRC.size] = header + _CRC.pack(zlib.crc32(header))


def _replay(channel: Channel, chance: random.Random) -> None:
    """Put another word in force: the one before, if both directories were used, or any."""
    word = chance.choice((channel.word - 1, channel.word - 2, channel.word ^ 1, chance.getrandbits(64)))
    channel.bytes[64:72] = struct.pack("<Q", word % 2**64)


def _flip(channel: Channel, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 9)):
        place = chance.randrange(chance.choice((64, channel.buffers, len(channel.bytes))))
        channel.bytes[place] ^= 1 << chance.randrange(8)


def _resize(channel: Channel, chance: random.Random) -> None:
    if chance.random() < 0.2:
        channel.path.unlink()
    else:
        os.ftruncate(channel.descriptor, chance.randrange(2 * len(channel.bytes)))


def damage_ring(path: Path, chance: random.Random) -> None:
    """Damage the feature ring at ``path``: its header with a right checksum, some bytes, or its size."""
    image = bytearray(path.read_bytes())
    kind = chance.randrange(4)
    if kind == 0:
        header = bytearray(image[: _RING_HEADER.size])
        place = chance.randrange(8, len(header))
        header[place] ^= 1 << chance.randrange(8)
        image[: len(header) + _CRC.size] = header + _CRC.pack(zlib.crc32(header))
    for _ in range(chance.randrange(9) if kind == 1 else 0):
        image[chance.randrange(chance.choice((128, len(image))))] ^= 1 << chance.randrange(8)
    with path.open("r+b") as file:
        file.write(image)
        if kind == 2:
            file.truncate(chance.randrange(2 * len(image)))
    if kind == 3:
        path.unlink()
