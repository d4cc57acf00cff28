"""A process that enforces a grammar, and the sequences in it, as the engine sees them. Nothing here waits."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import signal
import socket
import time

import msgspec
import numpy as np
import structlog

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar_cursor import GRAMMAR_SPENT, GrammarCursor, Masks
from evospec.engine.sampling.grammar_messages import (
    COMPILE_SECONDS,
    MASKS_PER_SLOT,
    MAX_MESSAGE_BYTES,
    MEMORY_BYTES,
    Answer,
    Answers,
    Ask,
    Compiled,
    Fork,
    GrammarMessage,
    Started,
)

log = structlog.get_logger(__name__)

_NOT_COMPILED = f"the schema or grammar takes more than {COMPILE_SECONDS:.0f} s or {MEMORY_BYTES >> 20} MiB to compile"
_LONGEST_WAIT = 30.0
"""Seconds that a sequence waits for a mask."""
_SLOW_SECONDS = 0.001
_COMPILE_PATIENCE, _MASK_PATIENCE, _LOW_PRIORITY = 1.0, 0.1, 15
"""A process that owes an answer for so many seconds is given this nice value."""


class ProcessCursor(GrammarCursor):
    """A ``GrammarCursor`` whose masks another process computes; ``GrammarProcess.receive`` finds them."""

    def __init__(self, process: GrammarProcess, slot: int, masks: Masks) -> None:
        super().__init__(masks)
        self._process, self._slot, self._num_unanswered = process, slot, 0
        self._is_new = True
        self._began_at = time.monotonic()
        self.first_number = self._number = next(process.numbers)

    def commit(self, token_ids: list[int]) -> None:
        super().commit(token_ids)
        self._number, self._began_at = next(self._process.numbers), time.monotonic()

    def ask(self, draft_token_ids: list[int]) -> None:
        if self._committed is None and draft_token_ids == self.drafts[: len(draft_token_ids)]:
            return
        self._number, self.drafts = next(self._process.numbers), draft_token_ids
        self.num_masks = min(self.num_masks, 1)  # the process writes the others anew
        self._num_unanswered += 1
        ask = Ask(self._slot, self._number, self._committed or [], draft_token_ids, self._is_new)
        self._process.unsent.append(ask)
        self._committed, self._is_new = None, False

    def end(self) -> None:
        self._process.end(self._slot)

    @property
    def is_answered(self) -> bool:
        return (self._num_unanswered == 0 and self._committed is None) or self.failure is not None

    def take(self, answer: Answer) -> None:
        """An answer of the process; it says nothing if the output has grown since, or something else was asked."""
        self._num_unanswered -= 1
        if answer.number != self._number:
            return
        self.is_slow = answer.seconds > _SLOW_SECONDS
        self._settle(answer.num_masks, answer.failure)

    def give_up(self, now: float) -> None:
        if not self.is_known and now - self._began_at > _LONGEST_WAIT:
            self.failure = GRAMMAR_SPENT


class GrammarProcess:
    """One grammar, and the process that enforces it, for ``num_slots`` sequences at a time.

    ``control``: socket of the process that forks. ``num_words``: of a mask, 32 tokens each. ``OSError`` if that process
    is gone, or there is no memory or descriptor to spare.
    """

    def __init__(self, control: socket.socket, grammar: Grammar, num_slots: int, num_words: int) -> None:
        self.is_compiled = self.is_refused = False
        """Whether it has found its grammar to be usable, or not."""
        self.is_cheap = False
        """Whether the engine can as well compute the masks itself."""
        self.error: str | None = None
        """Why it is of no more use, in words fit for the client."""
        self.cursors: dict[int, ProcessCursor] = {}
        """Of its sequences, by slot."""
        self.num_bytes = 0
        """Of memory that its grammar takes."""
        self._free_slots = list(reversed(range(num_slots)))
        self.unsent: list[Ask] = []
        """What the next ``flush`` sends."""
        self.numbers = itertools.count(1)
        """Numbers that no ask has had."""
        self._num_unanswered = 0
        self._pid: int | None = None
        self._pidfd: int | None = None
        """Stands for the process also once its id belongs to another."""
        self._waits_since: float | None = None
        """Since when it computes what is waited for; None: it does not, or has a low priority already."""
        self._buffer = memoryview(bytearray(MAX_MESSAGE_BYTES))
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(GrammarMessage)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        text, shape = msgspec.msgpack.encode(grammar), (num_slots, MASKS_PER_SLOT, num_words)
        with theirs, os.fdopen(os.memfd_create("evospec-grammar"), "r+b", buffering=0) as memory:
            num_mask_bytes = 4 * math.prod(shape)
            os.ftruncate(memory.fileno(), num_mask_bytes + len(text))
            os.pwrite(memory.fileno(), text, num_mask_bytes)
            self._masks: Masks = np.frombuffer(mmap.mmap(memory.fileno(), num_mask_bytes), np.int32).reshape(shape)
            fork = self._encoder.encode(Fork(num_slots, len(text)))
            socket.send_fds(control, [fork], [theirs.fileno(), memory.fileno()])

    def fileno(self) -> int:
        """Of its socket, for ``select``."""
        return self._channel.fileno()

    @property
    def is_compiling(self) -> bool:
        """Whether its grammar may still turn out to be usable or not."""
        return not self.is_compiled and self.error is None

    @property
    def owes_answers(self) -> bool:
        """Whether something is to be received."""
        return self.error is None and (self._num_unanswered > 0 or not self.is_compiled)

    @property
    def is_idle(self) -> bool:
        """Whether it could serve, and serves nobody."""
        return self.is_compiled and self.error is None and not self.cursors

    def begin(self) -> ProcessCursor | None:
        """A sequence at the grammar's start; None: there is no room for another."""
        if not self._free_slots:
            return None
        slot = self._free_slots.pop()
        cursor = self.cursors[slot] = ProcessCursor(self, slot, self._masks[slot])
        return cursor

    def end(self, slot: int) -> None:
        """A sequence is over."""
        del self.cursors[slot]
        self._free_slots.append(slot)
        self.unsent.append(Ask(slot, is_over=True))

    def flush(self) -> None:
        """Send what was asked. What the socket has no room for waits for the next time."""
        if not self.unsent or self.error is not None:
            return
        try:
            self._channel.send(self._encoder.encode(self.unsent))
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        if self._num_unanswered == 0:
            self._waits_since = time.monotonic()
        self._num_unanswered += sum(not ask.is_over for ask in self.unsent)
        self.unsent = []

    def receive(self) -> None:
        """Take all answers that have come, and see that it does not hold up the engine."""
        while self.owes_answers:
            try:
                num_bytes = self._channel.recv_into(self._buffer)
            except BlockingIOError:
                self._put_behind()
                return
            except OSError:
                num_bytes = 0
            if num_bytes:
                self._handle(self._decoder.decode(self._buffer[:num_bytes]))
            else:
                self._end()

    def kill(self) -> None:
        """It is not needed any more, or must not go on."""
        if self.error is None and self._pid is None:
            self._hear_last()
        if self.error is None and self._pid is not None:
            self._send_kill()
        self._fail(GRAMMAR_SPENT)

    def _send_kill(self) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _hear_last(self) -> None:
        """Take its first message, if it has come; if not, the process ends when it cannot send it."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            self._channel.shutdown(socket.SHUT_RD)
            if num_bytes := self._channel.recv_into(self._buffer):
                self._handle(self._decoder.decode(self._buffer[:num_bytes]))

    def _handle(self, message: GrammarMessage) -> None:
        match message:
            case Started():
                self._pid, self._waits_since = message.pid, time.monotonic()
                with contextlib.suppress(ProcessLookupError):  # it has ended, which its socket tells
                    self._pidfd = os.pidfd_open(message.pid)
            case Compiled():
                self.is_compiled, self.is_refused = message.error is None, message.error is not None
                self._waits_since, self.num_bytes, self.is_cheap = None, message.num_bytes, message.is_cheap
                if message.error is not None:
                    self._fail(message.error)
            case Answers():
                self._num_unanswered -= len(message.answers)
                for answer in message.answers:
                    cursor = self.cursors.get(answer.slot)
                    if cursor is not None and answer.number >= cursor.first_number:  # else of the slot's last sequence
                        cursor.take(answer)
                if self._num_unanswered == 0:
                    self._waits_since = None

    def _put_behind(self) -> None:
        """Let the engine have the processor first once this process computes for long."""
        patience = _MASK_PATIENCE if self.is_compiled else _COMPILE_PATIENCE
        if self._pid is None or self._waits_since is None or time.monotonic() - self._waits_since < patience:
            return
        self._waits_since = None
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._pid, _LOW_PRIORITY)

    def _end(self) -> None:
        """The process has ended."""
        log.warning("a grammar's process has ended", pid=self._pid, compiled=self.is_compiled)
        self._fail(GRAMMAR_SPENT if self.is_compiled else _NOT_COMPILED)

    def _fail(self, reason: str) -> None:
        self.error = self.error or reason
        self._channel.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        for cursor in self.cursors.values():
            cursor.failure = cursor.failure or reason
