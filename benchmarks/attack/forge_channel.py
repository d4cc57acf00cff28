"""Weight channels with a right checksum and wrong contents, forged by a process of the same user.

Each is forged while the engine runs, and once more before its server starts again.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.attack.bars import exactly
from benchmarks.attack.clients import FOUR_TOKENS, ask
from benchmarks.attack.server import VICTIM, Server, serving
from benchmarks.common.process import ServerFailed

# Places in a weight channel's file (engine/online/weight_directory.py).
_HEADER = struct.Struct("<8sIIQ32s")
_CRC, _PREFIX, _WORD = struct.Struct("<I"), struct.Struct("<II"), struct.Struct("<Q")
_WORD_OFFSET, _DIRECTORY_OFFSET = 64, 128
_DIRECTORY_MARGIN, _BYTES_PER_SLOT = 64, 160
_PAGE = 4096
_CHURN_SECONDS = 6.0
BARS = {"modes_answered": exactly(1), "modes_started": exactly(1), "wrong_answers": exactly(0)}


class Channel:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR)
        self.bytes = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)
        self.magic, _, self.num_slots, self.stride, self.fingerprint = _HEADER.unpack_from(self.bytes)
        self.directory_size = _DIRECTORY_MARGIN + self.num_slots * _BYTES_PER_SLOT
        end = _DIRECTORY_OFFSET + 2 * self.directory_size
        self.buffers = -(-end // _PAGE) * _PAGE

    @property
    def word(self) -> int:
        """The version times two, and which directory is in force."""
        return int(_WORD.unpack_from(self.bytes, _WORD_OFFSET)[0])

    def slots(self) -> list[list[Any]]:
        """Key, version, buffer and checksum of each."""
        start = _DIRECTORY_OFFSET + (self.word & 1) * self.directory_size + _PREFIX.size
        _, length = _PREFIX.unpack_from(self.bytes, start - _PREFIX.size)
        slots: list[list[Any]] = msgspec.msgpack.decode(self.bytes[start : start + length])[1]
        return slots

    def commit(self, payload: bytes) -> None:
        """Put a directory in force, with a right checksum."""
        index, version = 1 - (self.word & 1), (self.word >> 1) + 1
        start = _DIRECTORY_OFFSET + index * self.directory_size
        content = _PREFIX.pack(zlib.crc32(payload), len(payload)) + payload
        self.bytes[start : start + len(content)] = content
        self.bytes[_WORD_OFFSET : _WORD_OFFSET + 8] = _WORD.pack(version << 1 | index)

    def publish(self, *changed: Sequence[Any]) -> None:
        """Put the first slots in force as ``changed``: key, version, buffer, checksum."""
        slots = self.slots()
        slots[: len(changed)] = [list(slot) for slot in changed]
        self.commit(msgspec.msgpack.encode([self.version + 1, slots]))

    @property
    def version(self) -> int:
        return self.word >> 1

    def fill(self, buffer: int, pattern: bytes) -> int:
        content = (pattern * (self.stride // len(pattern) + 1))[: self.stride]
        start = self.buffers + buffer * self.stride
        self.bytes[start : start + self.stride] = content
        return zlib.crc32(content)

    def slot(self, buffer: int, checksum: int = 1) -> tuple[str, int, int, int]:
        """A slot of the attacker's next version."""
        return "acme", self.version + 1, buffer, checksum


def _noise(num_bytes: int) -> bytes:
    """Random bytes whose first bfloat16 is not a number: of few enough, all would be finite now and then."""
    return b"\xff\x7f" + os.urandom(num_bytes - 2)


def _bad_text(channel: Channel) -> None:
    slot = b"\x94\xa2\xff\xfe\x01\x00\x00"
    channel.commit(b"\x92\x01" + bytes([0x90 | channel.num_slots]) + slot * channel.num_slots)


def _bad_header(channel: Channel) -> None:
    header = _HEADER.pack(channel.magic, 77, channel.num_slots, channel.stride, channel.fingerprint)
    channel.bytes[: len(header) + _CRC.size] = header + _CRC.pack(zlib.crc32(header))


def _write(channel: Channel, offset: int, content: bytes) -> None:
    channel.bytes[offset : offset + len(content)] = content


def _churn(channel: Channel) -> None:
    end = time.monotonic() + _CHURN_SECONDS
    while time.monotonic() < end:
        buffer = channel.version % 2
        channel.publish(channel.slot(buffer, channel.fill(buffer, _noise(_PAGE))))


MODES: dict[str, Callable[[Channel], None]] = {
    "wrong checksum": lambda channel: channel.publish(channel.slot(0, 12345)),
    "not a number": lambda channel: channel.publish(channel.slot(0, channel.fill(0, b"\xff\x7f"))),
    "infinite": lambda channel: channel.publish(channel.slot(0, channel.fill(0, b"\x80\x7f"))),
    "noise": lambda channel: channel.publish(channel.slot(0, channel.fill(0, _noise(channel.stride)))),
    "buffer 9": lambda channel: channel.publish(channel.slot(9)),
    "buffer 1000000": lambda channel: channel.publish(channel.slot(10**6)),
    "buffer -1": lambda channel: channel.publish(channel.slot(-1)),
    "buffer -99999": lambda channel: channel.publish(channel.slot(-99999)),
    "version -5": lambda channel: channel.publish(("acme", -5, 0, channel.fill(0, b"\1\2"))),
    "one key twice": lambda channel: channel.publish(
        channel.slot(0, channel.fill(0, b"\1\2")), channel.slot(0, channel.fill(2, b"\1\3"))
    ),
    "bad text": _bad_text,
    "deep": lambda channel: channel.commit(b"\x91" * (channel.directory_size - 20)),
    "word": lambda channel: _write(channel, _WORD_OFFSET, os.urandom(8)),
    "header": lambda channel: _write(channel, 20, os.urandom(20)),
    "header with checksum": _bad_header,
    "zeros": lambda channel: _write(channel, 0, bytes(len(channel.bytes))),
    "empty file": lambda channel: os.ftruncate(channel.descriptor, 0),
    "one page": lambda channel: os.ftruncate(channel.descriptor, _PAGE),
    "unlinked": lambda channel: channel.path.unlink(),
    "churn": _churn,
}


def forge(path: Path, mode: str) -> None:
    """Forge the channel at ``path``; leave it where it cannot be read, as another mode may have left it."""
    with suppress(OSError, ValueError, IndexError, struct.error, msgspec.MsgspecError):
        channel = Channel(path)
        try:
            MODES[mode](channel)
        finally:
            channel.bytes.close()
            os.close(channel.descriptor)


def run(source: Path) -> dict[str, float]:
    """Shares of the modes after which the running engine answered, and after which the next one started."""
    answered = started = wrong = 0
    expected = forged = None
    pending = list(MODES)
    with tempfile.TemporaryDirectory(prefix="evospec-attack-") as directory:
        path, options = channel_options(Path(directory))
        while pending or forged:
            try:
                with serving(source, "channel", *options) as server:
                    started += forged is not None
                    text = _text(server)
                    expected = expected or text
                    wrong += text != expected
                    forged = pending.pop(0) if pending else None
                    if forged:
                        forge(path, forged)
                        time.sleep(1)
                        text = _text(server)
                        answered += text is not None
                        wrong += text not in (None, expected)
                if forged:
                    forge(path, forged)
            except ServerFailed:
                if forged is None:
                    raise
                forged = None
                path.unlink(missing_ok=True)
    return {
        "modes_answered": answered / len(MODES),
        "modes_started": started / len(MODES),
        "wrong_answers": wrong,
    }


def channel_options(directory: Path) -> tuple[Path, list[str]]:
    """Where a server with these options has its channel."""
    shared = directory / "shared"
    options = ["--engine.alignment.enabled", "--engine.alignment.shared_directory", str(shared)]
    return shared / "weights", [*options, "--engine.alignment.state_directory", str(directory / "state")]


def _text(server: Server) -> str | None:
    """The answer to a fixed question; None: there was none."""
    answer = ask(server, VICTIM, {**FOUR_TOKENS, "max_tokens": 24}, timeout=60)
    return str(answer.body["choices"][0]["text"]) if answer.is_served else None
