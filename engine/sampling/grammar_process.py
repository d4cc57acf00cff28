"""Processes that enforce grammars: ``python -m engine.sampling.grammar_process CONTROL VOCABULARY`` (file descriptors).

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

from engine.messages import Grammar
from engine.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from engine.sampling.grammar_messages import (
    COMPILE_SECONDS,
    MASK_SECONDS,
    MASKS_PER_SLOT,
    MAX_MESSAGE_BYTES,
    MEMORY_BYTES,
    MORE_MEMORY_BYTES,
    SECONDS_PER_MASK,
    SPARE_SECONDS,
    Answer,
    Answers,
    Ask,
    Compiled,
    Failure,
    Fork,
    Started,
    Vocabulary,
)
from engine.sampling.json_schema import GrammarError

_TRIAL_MASKS, _TRIAL_SEED = 24, 0
_TRIAL_SECONDS = 0.02
"""A grammar whose masks take longer in a trial is refused before anybody waits for them."""
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


class _Sequence:
    """One sequence's place in the grammar, and what it has cost so far, in seconds of computing."""

    def __init__(self, matcher: GrammarMatcher, masks: NDArray[np.int32], bound: _Bound) -> None:
        self._matcher, self._bound = matcher, bound
        self._masks = masks
        """[MASKS_PER_SLOT, words]"""
        self._spent = 0.0
        self._last_seconds = 0.0
        self._num_computed = 0
        self._failure: Failure = ""

    def answer(self, ask: Ask) -> Answer:
        """Follow the output, and write the masks that the ask is about."""
        started = self._bound.go_on()
        if ask.committed or not self._num_computed:
            if not all(map(self._matcher.accept, ask.committed)):
                self._failure = "contradiction"
            started = self._fill(0, started)
        seconds = self._last_seconds
        num_masks = 0 if self._failure else 1 + self._look_ahead(ask.drafts, started)
        return Answer(ask.slot, ask.round, num_masks, seconds, self._failure)

    def _look_ahead(self, drafts: list[int], started: float) -> int:
        """Masks after each draft, up to the first that is not allowed or has nothing after it; returns their number."""
        taken = num_masks = 0
        while taken == num_masks < len(drafts) and self._matcher.accept(drafts[taken]):
            taken += 1
            started = self._fill(taken, started)
            num_masks += not self._failure and bool(self._masks[taken].any())
        if taken:
            self._matcher.rollback(taken)
        return num_masks

    def _fill(self, row: int, started: float) -> float:
        """Write one mask, unless the sequence has failed. ``started``: when its time began; returns when it ended."""
        if not self._failure:
            self._matcher.fill_bitmask(self._masks, row)
        ended = self._bound.go_on()
        self._last_seconds = ended - started
        self._spent += self._last_seconds
        self._num_computed += 1
        if not self._failure and self._spent > SPARE_SECONDS + SECONDS_PER_MASK * self._num_computed:
            self._failure = "spent"
        return ended


def _try_out(grammar: CompiledGrammar, vocab_size: int, bound: _Bound) -> None:
    """Compute masks along a random text; raises ``GrammarError`` where they take too long to be used."""
    bound.start(MASK_SECONDS)
    matcher, random = grammar.matcher(), np.random.default_rng(_TRIAL_SEED)
    mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)
    slow = 0
    for _ in range(_TRIAL_MASKS):
        started = bound.go_on()
        matcher.fill_bitmask(mask, 0)
        slow += bound.go_on() - started > _TRIAL_SECONDS
        if slow > 1:  # once, that says little
            raise GrammarError(
                "the JSON schema is too ambiguous: to find out which tokens may come next takes more than "
                f"{1000 * _TRIAL_SECONDS:.0f} ms"
            )
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:vocab_size])
        if not len(allowed) or not matcher.accept(int(random.choice(allowed))):
            return


def _serve(channel: socket.socket, memory: mmap.mmap, fork: Fork, compiler: GrammarCompiler, vocab_size: int) -> None:
    """One grammar's process, until the engine closes the channel."""
    encode = msgspec.msgpack.Encoder().encode
    forked_bytes = _data_bytes()
    _limit_memory(forked_bytes + MEMORY_BYTES)
    channel.send(encode(Started(os.getpid())))
    bound = _Bound(COMPILE_SECONDS)
    masks_shape = fork.num_slots, MASKS_PER_SLOT, fork.num_words
    masks = np.frombuffer(memory, dtype=np.int32, count=int(np.prod(masks_shape))).reshape(masks_shape)
    try:
        grammar = msgspec.msgpack.decode(memory[masks.nbytes : masks.nbytes + fork.num_grammar_bytes], type=Grammar)
        compiled = compiler.compile(grammar)
        _try_out(compiled, vocab_size, bound)
    except GrammarError as error:
        channel.send(encode(Compiled(error=str(error))))
        return
    except MemoryError:
        channel.send(encode(Compiled(error=f"the JSON schema takes more than {MEMORY_BYTES >> 20} MiB to compile")))
        return
    compiled_bytes = _data_bytes()
    _limit_memory(compiled_bytes + MORE_MEMORY_BYTES)
    channel.send(encode(Compiled(compiled_bytes - forked_bytes)))
    sequences: dict[int, _Sequence] = {}
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
                sequences[ask.slot] = _Sequence(compiled.matcher(), masks[ask.slot], bound)
            answers.append(sequences[ask.slot].answer(ask))
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
