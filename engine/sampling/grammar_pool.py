"""Which grammars have a process, and the requests that wait for one to be compiled."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
import structlog

from evospec.engine.fair_queue import equal_share
from evospec.engine.messages import Grammar
from evospec.engine.request import Request
from evospec.engine.sampling.grammar_client import GrammarProcess
from evospec.engine.sampling.grammar_cursor import GrammarCursor
from evospec.engine.sampling.grammar_in_place import InPlaceCompiler, InPlaceGrammar
from evospec.engine.sampling.grammar_messages import Vocabulary
from evospec.engine.text.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

_MAX_PROCESSES = 32
"""In all; a tenant with less than an equal share may have more."""
_MAX_BYTES, _MAX_TENANT_BYTES = 1024**3, 512 * 1024**2
"""The same of memory that grammars take, in all and of a tenant; they are checked before another is compiled."""
_MAX_REMEMBERED = 256
"""Grammars that turned out to be unusable."""
_MAX_COMPILING = 4

_Key = tuple[str, Grammar]
"""A tenant and its grammar: tenants share none, so that none can tell what another uses."""


class _Wanted(NamedTuple):
    """A grammar that is waited for, and the requests that wait for it, by id in order of arrival.

    Whoever waits uses this key, since equal ones are compared text by text.
    """

    key: _Key
    requests: dict[str, Request]


class GrammarPool:
    """Gives each grammar of a tenant a process of its own, which is its cache as well.

    A tenant compiles one grammar at a time, and tenants take turns. Where there are too many processes, one without
    sequences ends: of the tenant that has most, the least recently used one.

    ``num_slots``: most sequences of one grammar.
    """

    def __init__(self, tokenizer: Tokenizer, num_slots: int) -> None:
        self._tokenizer, self._num_slots = tokenizer, num_slots
        self._num_words = -(-tokenizer.vocab_size // 32)
        self._control: socket.socket | None = None
        self._compiler: InPlaceCompiler | None = None
        self._grammars: dict[_Key, GrammarProcess | InPlaceGrammar] = {}
        """Least recently used first."""
        self._errors: OrderedDict[_Key, str] = OrderedDict()
        """Of grammars that turned out to be unusable."""
        self._deaths: dict[_Key, str] = {}
        """Why processes have ended by themselves since ``take_ready``: another try may fare better."""
        self.waiting: dict[str, _Wanted] = {}
        """What requests wait for, by their ids."""
        self._wanted: dict[_Key, _Wanted] = {}
        """The same without repetition, in the order in which it was first asked for."""
        self._num_turns = 0
        self._turns: dict[str, int] = {}
        """When each tenant's latest compilation began, counted in compilations."""

    def start(self) -> None:
        """Load what every grammar needs, beside whatever the engine does meanwhile."""
        if self._control is None:
            token_bytes = [self._tokenizer.token_bytes(token_id) for token_id in range(self._tokenizer.vocab_size)]
            vocabulary = Vocabulary(token_bytes, list(self._tokenizer.eos_token_ids))
            self._control = _start_forking(msgspec.msgpack.encode(vocabulary))
            self._compiler = self._compiler or InPlaceCompiler(vocabulary)

    def add(self, request: Request) -> None:
        """Have the request's grammar compiled, if it is not yet."""
        assert request.sampling.grammar is not None
        key = request.tenant, request.sampling.grammar
        wanted = self.waiting[request.request_id] = self._wanted.setdefault(key, _Wanted(key, {}))
        wanted.requests[request.request_id] = request

    def forget(self, request_id: str) -> None:
        """A request that may wait is gone; what only it has waited for is not compiled."""
        if request_id not in self.waiting:
            return
        key, requests = self._end_wait(request_id)
        if requests:
            return
        process = self._grammars.get(key)
        if process is not None and process.is_compiling:
            process.kill()
            del self._grammars[key]

    def take_ready(self) -> list[tuple[Request, GrammarCursor | str]]:
        """The requests that wait no longer, each with its cursor, or why its grammar cannot be enforced."""
        self.poll()
        ready: list[tuple[Request, GrammarCursor | str]] = []
        for key, requests in list(self._wanted.values()):
            for request in list(requests.values()):
                result = self._take(key)
                if result is None:
                    break
                self._end_wait(request.request_id)
                ready.append((request, result))
        self._deaths.clear()
        if self.waiting:
            self._compile_next()
        return ready

    def flush(self) -> None:
        """Send what was asked."""
        for _, process in self._processes():
            process.flush()

    def poll(self) -> None:
        """Send what was asked, take what was answered."""
        for key, process in self._processes():
            try:
                process.flush()
                process.receive()
            except Exception:
                log.exception("a grammar's process cannot be understood, and is ended")
                process.kill()
            if process.error is not None:
                del self._grammars[key]
                (self._errors if process.is_refused else self._deaths)[key] = process.error
                if len(self._errors) > _MAX_REMEMBERED:
                    self._errors.popitem(last=False)
            elif process.is_cheap and self._compiler is not None:
                self._grammars[key] = self._compiler.compile(key[1], process.num_bytes)
                process.kill()

    def wait(self, cursors: Iterable[GrammarCursor], seconds: float) -> None:
        """Poll until all these sequences have the masks that they asked for, but no longer than so many seconds."""
        late, deadline = _late(cursors), time.monotonic() + seconds
        while late:
            self.poll()
            late = _late(late)
            seconds = deadline - time.monotonic()
            if not late or seconds <= 0:
                return
            poller = select.poll()
            for _, process in self._processes():
                if process.owes_answers:
                    poller.register(process, select.POLLIN)
            poller.poll(1000 * seconds)

    def _processes(self) -> list[tuple[_Key, GrammarProcess]]:
        """The grammars that have a process."""
        return [(key, one) for key, one in self._grammars.items() if not isinstance(one, InPlaceGrammar)]

    def _take(self, key: _Key) -> GrammarCursor | str | None:
        """A sequence of a grammar, or its error; None while it is not known."""
        if error := self._errors.get(key) or self._deaths.get(key):
            return error
        process = self._grammars.get(key)
        if process is None or process.is_compiling:
            return None
        self._grammars[key] = self._grammars.pop(key)
        try:
            return process.begin()
        except Exception:
            if process is not self._grammars.get(key) or not isinstance(process, InPlaceGrammar):
                raise
            log.exception("a grammar cannot be enforced in the engine: processes enforce all from now on")
            self._compiler = None
            del self._grammars[key]
            return None

    def _end_wait(self, request_id: str) -> _Wanted:
        """A request waits no longer; what it waited for, and who else does."""
        wanted = self.waiting.pop(request_id)
        del wanted.requests[request_id]
        if not wanted.requests:
            del self._wanted[wanted.key]
        return wanted

    def _compile_next(self) -> None:
        """Start compiling what is waited for, as far as it is the turn of its tenant."""
        compiling = {tenant for (tenant, _), process in self._grammars.items() if process.is_compiling}
        wanted = [key for key in self._wanted if key[0] not in compiling and key not in self._grammars]
        for key in sorted(wanted, key=lambda key: self._turns.get(key[0], 0)):
            tenant, grammar = key
            if len(compiling) == _MAX_COMPILING or tenant in compiling or not self._make_room(tenant):
                continue
            self.start()
            assert self._control is not None
            try:
                self._grammars[key] = GrammarProcess(self._control, grammar, self._num_slots, self._num_words)
            except OSError as error:
                log.warning("a grammar cannot be compiled at the moment", reason=str(error))
                self._control = None
                _start_forking.cache_clear()
                return
            self._num_turns += 1
            self._turns[tenant] = self._num_turns
            compiling.add(tenant)

    def _make_room(self, tenant: str) -> bool:
        """End processes that do nothing if there is too much; whether the tenant may have another."""
        while True:
            count, size = Counter[str](), Counter[str]()
            for (owner, _), process in self._grammars.items():
                count[owner] += 1
                size[owner] += process.num_bytes
            is_too_large = size[tenant] >= _MAX_TENANT_BYTES
            if not is_too_large and count.total() < _MAX_PROCESSES and size.total() < _MAX_BYTES:
                return True
            owners = [tenant] if is_too_large else sorted(count, key=lambda owner: -count[owner])
            if not self._end_idle(owners):
                return not is_too_large and count[tenant] < equal_share(_MAX_PROCESSES, count, tenant)

    def _end_idle(self, owners: Sequence[str]) -> bool:
        """End the process that was used longest ago of the first of these tenants that has one without sequences."""
        for owner in owners:
            for key, process in self._grammars.items():
                if key[0] == owner and process.is_idle and key not in self._wanted:
                    self._grammars.pop(key).kill()
                    return True
        return False


def _late(cursors: Iterable[GrammarCursor]) -> list[GrammarCursor]:
    return [cursor for cursor in cursors if not cursor.is_answered]


@lru_cache(maxsize=1)
def _start_forking(vocabulary: bytes) -> socket.socket:
    """Start the process that forks, for an encoded ``Vocabulary``; its control socket. It ends when that is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, os.fdopen(os.memfd_create("evospec-vocabulary"), "r+b") as file:
        file.write(vocabulary)
        file.seek(0)
        descriptors = theirs.fileno(), file.fileno()
        subprocess.Popen(
            [sys.executable, "-m", "evospec.engine.sampling.grammar_process", *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )
    return ours
