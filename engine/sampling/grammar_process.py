"""Enforces grammars: ``python -m evospec.engine.sampling.grammar_process CONTROL VOCABULARY`` (descriptors).

That process loads xgrammar and the vocabulary once, and then forks one process for each grammar of a tenant. Such a
process compiles its grammar and computes masks until the engine closes its socket. The kernel ends it when it computes
too long or takes too much memory, whatever it is in the middle of; nobody but the requests of that grammar notices.
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import signal
import socket
import sys
import time
import traceback

import msgspec
import numpy as np
from numpy.typing import NDArray

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, GrammarSequence
from evospec.engine.sampling.grammar_messages import (
    COMPILE_SECONDS,
    MASK_SECONDS,
    MASKS_PER_SLOT,
    MAX_MESSAGE_BYTES,
    MEMORY_BYTES,
    MORE_MEMORY_BYTES,
    Answer,
    Answers,
    Ask,
    Compiled,
    Fork,
    Started,
    Vocabulary,
)
from evospec.engine.sampling.json_schema import GrammarError
from evospec.engine.sampling.ordinary_schema import is_ordinary

_TRIAL_MASKS, _TRIAL_SEED = 24, 0
_TRIAL_SECONDS = 0.02
"""A grammar whose masks take longer in a trial is refused before anybody waits for them."""
_CHEAP_SECONDS_TO_COMPILE, _CHEAP_SECONDS, _CHEAP_BYTES = 0.1, 0.0002, 16 * 1024**2
"""What the engine may take on itself: compilation beside its steps, masks in the same trial, memory."""
_SEND_EVERY = 0.001
_NICE = 5
"""Beside the engine, which has to compute whatever a grammar allows."""


class _Bound:
    """Has the kernel end this process where it computes for longer than it may. All times are of its computing."""

    def __init__(self, seconds: float) -> None:
        self.start(seconds)

    def start(self, seconds: float) -> None:
        """From now on, something may take so many seconds."""
        signal.setitimer(signal.ITIMER_PROF, seconds)
        self._seconds, self._started = seconds, time.process_time()

    def go_on(self) -> float:
        """Something else begins that may take as long, give or take a tenth. Returns the time."""
        now = time.process_time()
        if now - self._started > self._seconds / 10:
            self.start(self._seconds)
        return now


def _try_out(grammar: CompiledGrammar, vocab_size: int, bound: _Bound) -> float:
    """Compute masks along a random text; returns the seconds that all but one of them stay below.

    ``GrammarError`` if they take too long to be used.
    """
    bound.start(MASK_SECONDS)
    matcher, random = GrammarMatcher(grammar), np.random.default_rng(_TRIAL_SEED)
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    longest = second = 0.0  # once, that says little
    for _ in range(_TRIAL_MASKS):
        started = bound.go_on()
        matcher.fill_bitmask(mask, 0)
        seconds = bound.go_on() - started
        longest, second = max(longest, seconds), max(second, min(longest, seconds))
        if second > _TRIAL_SECONDS:
            raise GrammarError(
                "the schema or grammar is too ambiguous: to find out which tokens may come next takes more than "
                f"{1000 * _TRIAL_SECONDS:.0f} ms"
            )
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:vocab_size])
        if not len(allowed) or not matcher.accept(int(random.choice(allowed))):
            break
    return second


def _serve(channel: socket.socket, memory: mmap.mmap, fork: Fork, compiler: GrammarCompiler, vocab_size: int) -> None:
    """One grammar's process, until the engine closes the channel."""
    encode = msgspec.msgpack.Encoder().encode
    forked_bytes = _data_bytes()
    _limit_memory(forked_bytes + MEMORY_BYTES)
    channel.send(encode(Started(os.getpid())))
    bound = _Bound(COMPILE_SECONDS)
    masks_shape = fork.num_slots, MASKS_PER_SLOT, -(-vocab_size // 32)
    masks = np.frombuffer(memory, dtype=np.int32, count=int(np.prod(masks_shape))).reshape(masks_shape)
    try:
        grammar = msgspec.msgpack.decode(memory[masks.nbytes : masks.nbytes + fork.num_grammar_bytes], type=Grammar)
        compiled = compiler.compile(grammar)
        compile_seconds = time.process_time()
        mask_seconds = _try_out(compiled, vocab_size, bound)
    except (GrammarError, MemoryError) as error:
        too_large = f"the schema or grammar takes more than {MEMORY_BYTES >> 20} MiB to compile"
        channel.send(encode(Compiled(error=str(error) if isinstance(error, GrammarError) else too_large)))
        return
    num_bytes = _data_bytes() - forked_bytes
    is_cheap = compile_seconds < _CHEAP_SECONDS_TO_COMPILE and mask_seconds < _CHEAP_SECONDS
    is_cheap = is_cheap and num_bytes < _CHEAP_BYTES and is_ordinary(grammar)
    _limit_memory(_data_bytes() + MORE_MEMORY_BYTES)
    channel.send(encode(Compiled(num_bytes, is_cheap)))
    _follow(channel, compiled, masks, bound)


def _follow(channel: socket.socket, compiled: CompiledGrammar, masks: NDArray[np.int32], bound: _Bound) -> None:
    """Answer asks until the engine closes the channel. ``masks``: [slots, MASKS_PER_SLOT, words]."""
    encode = msgspec.msgpack.Encoder().encode
    sequences: dict[int, GrammarSequence] = {}
    decoder = msgspec.msgpack.Decoder(list[Ask])
    buffer = memoryview(bytearray(MAX_MESSAGE_BYTES))
    while num_bytes := channel.recv_into(buffer):
        answers: list[Answer] = []
        send_at = time.monotonic() + _SEND_EVERY
        for ask in decoder.decode(buffer[:num_bytes]):
            if ask.is_over:
                sequences.pop(ask.slot, None)
                continue
            if ask.is_new:
                sequences[ask.slot] = GrammarSequence(GrammarMatcher(compiled), masks[ask.slot], bound.go_on)
            sequence = sequences[ask.slot]
            num_masks = sequence.follow(ask.committed, ask.drafts)
            answers.append(Answer(ask.slot, ask.number, num_masks, sequence.last_seconds, sequence.failure))
            if time.monotonic() > send_at:  # the others need not wait for one that takes long
                channel.send(encode(Answers(answers)))
                answers = []
                send_at = time.monotonic() + _SEND_EVERY
        if answers:
            channel.send(encode(Answers(answers)))


def _data_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * mmap.PAGESIZE


def _limit_memory(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _silence_libraries() -> None:
    """xgrammar writes lines of its own to standard error, which quote schemas; Python's errors still go there."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main() -> None:
    """Fork a process for each ``Fork`` until the engine closes the control socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
    control, vocabulary_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    with os.fdopen(vocabulary_fd, "rb") as file:
        vocabulary = msgspec.msgpack.decode(file.read(), type=Vocabulary)
    compiler = GrammarCompiler(vocabulary.token_bytes, vocabulary.end_token_ids)
    _silence_libraries()
    gc.freeze()  # or the first collection of each process would copy all of it
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 2)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            os.nice(_NICE)
            channel, memory = socket.socket(fileno=descriptors[0]), mmap.mmap(descriptors[1], 0)
            fork = msgspec.msgpack.decode(message, type=Fork)
            try:
                _serve(channel, memory, fork, compiler, len(vocabulary.token_bytes))
            except OSError:  # the engine is gone
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    main()
