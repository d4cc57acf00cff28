"""What ``benchmarks.faults`` does to a server: each fault is done from outside, for real, and then left to itself."""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.server import ENGINE, RING_ROWS, VALKEY, WORKER, Server, State
from evospec.engine.online.feature_ring import FeatureRingReader
from evospec.engine.online.shared_file import SharedFile, SharedMemoryError
from evospec.engine.online.weight_channel import WeightChannel, WeightWriter

_WAIT_SECONDS = 20.0
_SLICE_SECONDS = 3e-4
"""Most time that a worker may go on before one looks where it stands: about what a publication takes."""
_OTHER_RANK = 16
# Places in a weight channel's file (engine/online/weight_directory.py).
_FINGERPRINT, _HEADER_END, _WORD, _DIRECTORIES = 24, 56, 64, 128
_CHECKSUM = struct.Struct("<I")
_BEGINNING = 8
"""Bytes of a buffer by which one sees that something was put into it; a new channel's are 0."""


class Missed(Exception):
    """The moment for a fault went by."""


@dataclass(frozen=True)
class Fault:
    """``inject`` does it and says how; ``has_shown`` says what is missing for the fault to have had its effect.

    ``kills_engine``: requests in flight cannot be finished, and there is none to take new ones for a while.
    """

    about: str
    inject: Callable[[Server, random.Random], str]
    kills_engine: bool = False
    has_shown: Callable[[State, State], str] = lambda before, now: ""


def _nothing(server: Server, chance: random.Random) -> str:
    time.sleep(chance.uniform(0.5, 1.5))
    return ""


def _kill(module: str) -> Callable[[Server, random.Random], str]:
    def inject(server: Server, chance: random.Random) -> str:
        time.sleep(chance.uniform(0, 2))
        server.kill(module)
        return ""

    return inject


def _kill_in_publication(server: Server, chance: random.Random) -> str:
    """Kill the worker between the first byte of a publication and the word that puts it in force.

    In a new channel, which a damaged header brings about, it publishes all that it has, one key after another.
    """
    num_keys = len(server.state().in_channel)
    old = server.channel()
    _damage(old, _WORD - _BEGINNING, 1, chance)
    _until(old.directory.file.is_replaced, "another channel")
    channel, worker = server.channel(), server.child(WORKER)
    _until(lambda: _is_locked(channel.directory.file.path), "writer")
    to_pass = chance.randrange(num_keys)
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        # Let it go on for a moment, and look where it stands.
        time.sleep(chance.uniform(0, _SLICE_SECONDS))
        _stop(worker)
        slots = channel.slots()
        ended = sum(state.key is not None for state in slots)
        begun = [slot for slot, state in enumerate(slots) if state.key is None and any(_start(channel, slot))]
        if begun and ended >= to_pass:
            server.kill(WORKER)
            return "behind the buffer" if any(_end(channel, begun[0])) else "within the buffer"
        worker.resume()
        if ended == num_keys:
            raise Missed
    raise Missed


def _is_locked(path: Path) -> bool:
    """Whether a worker has attached to the channel and may publish at any moment."""
    return f":{path.stat().st_ino} " in Path("/proc/locks").read_text()


def _stop(process: psutil.Process) -> None:
    """Stop it, and wait until it stands."""
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:
        pass


def _fill_ring(server: Server, chance: random.Random) -> str:
    """Let the engine go round the ring while the worker stands still."""
    logged = server.state().records_written
    wanted = RING_ROWS * chance.uniform(1.0, 1.5)  # a record is a row at least
    with _stopped(server, WORKER):
        _until(lambda: server.state().records_written - logged > wanted, "records")
    return ""


def _damage_bytes(server: Server, chance: random.Random) -> str:
    """Damage what the engine looks at, and then, in the channel that it makes, all weights before it can read them."""
    num_keys = len(server.state().in_channel)
    _damage_ring(server, chance)
    channel = server.channel()
    size = channel.directory.data_offset - _DIRECTORIES
    places = {"header": (0, _HEADER_END), "word": (_WORD, 8), "directories": (_DIRECTORIES, size)}
    name = chance.choice(list(places))
    _damage(channel, *places[name], chance)
    _until(channel.directory.file.is_replaced, "another channel")
    with _stopped(server, ENGINE):
        channel = server.channel()
        _until(lambda: sum(slot.key is not None for slot in channel.slots()) == num_keys, "publications")
        for slot, state in enumerate(channel.slots()):
            if state.key is not None:
                start, file = _buffer_start(channel, slot, state.buffer), channel.directory.file
                place = start + chance.randrange(channel.directory.stride)
                file.write(place, bytes([file.read(place, 1)[0] ^ 1 << chance.randrange(8)]))
    return f"{name}, then a bit of each adapter"


def _damage_ring(server: Server, chance: random.Random) -> None:
    """A tenth of all feature rows, which are at the file's end."""
    path = server.model.options.ring_path
    size = 2 * FeatureRingReader(path).width
    file = SharedFile.open(path)
    for row in chance.sample(range(RING_ROWS), RING_ROWS // 10):
        file.write(file.size - (row + 1) * size, chance.randbytes(size))


def _wrong_fingerprint(server: Server, chance: random.Random) -> str:
    """A writer of other adapters; then the channel in use says that it is of others."""
    path, other = server.model.options.channel_path, server.model.layout(_OTHER_RANK)
    try:
        WeightWriter(path, other)
    except SharedMemoryError:
        pass
    else:
        raise RuntimeError("a writer of other weights was let in")
    file = server.channel().directory.file
    header = file.read(0, _FINGERPRINT) + other.fingerprint
    file.write(0, header + _CHECKSUM.pack(zlib.crc32(header)))
    return ""


def _wrong_fingerprint_at_start(server: Server, chance: random.Random) -> str:
    """An engine finds a channel of other adapters."""
    options = server.model.options
    server.kill(ENGINE)
    WeightChannel.create(options.channel_path, server.model.layout(_OTHER_RANK), options.num_slots).close()
    return ""


def _damage(channel: WeightChannel, start: int, size: int, chance: random.Random) -> None:
    file = channel.directory.file
    file.write(start, bytes(byte ^ chance.randrange(1, 256) for byte in file.read(start, size)))


def _start(channel: WeightChannel, slot: int) -> bytes:
    """The first bytes of what a new channel's slot gets first."""
    return channel.directory.file.read(_buffer_start(channel, slot, 1), _BEGINNING)


def _end(channel: WeightChannel, slot: int) -> bytes:
    """The last bytes of what a new channel's slot gets first."""
    end = _buffer_start(channel, slot, 1) + channel.directory.stride
    return channel.directory.file.read(end - _BEGINNING, _BEGINNING)


def _buffer_start(channel: WeightChannel, slot: int, index: int) -> int:
    return channel.directory.data_offset + (2 * slot + index) * channel.directory.stride


@contextmanager
def _stopped(server: Server, module: str) -> Iterator[None]:
    process = server.child(module)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def _until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {_WAIT_SECONDS:.0f} s")
        time.sleep(0.001)


def _has_lapsed(before: State, now: State) -> str:
    return "" if now.worker["num_lapsed"] > before.worker["num_lapsed"] else "no record has lapsed"


def _was_read(before: State, now: State) -> str:
    return "" if now.failed_loads >= before.failed_loads + 2 else "the engine has not read what was damaged"


FAULTS = {
    "none": Fault("no fault: the same load", _nothing),
    "worker": Fault("worker kill -9 at a random moment", _kill(WORKER)),
    "publish": Fault("worker kill -9 in mid-publish", _kill_in_publication),
    "engine": Fault("engine kill -9, worker alive", _kill(ENGINE), kills_engine=True),
    "valkey": Fault("Valkey kill -9 and restart", _kill(VALKEY)),
    "ring": Fault("feature ring full, worker behind", _fill_ring, has_shown=_has_lapsed),
    "bytes": Fault("corrupted bytes of channel and ring", _damage_bytes, has_shown=_was_read),
    "fingerprint": Fault("wrong fingerprint of writer and channel", _wrong_fingerprint),
    "start": Fault("wrong fingerprint of the channel found at start", _wrong_fingerprint_at_start, kills_engine=True),
}
