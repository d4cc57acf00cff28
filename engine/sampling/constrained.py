"""The requests whose output a grammar constrains, and the masks that each step needs of them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from engine.request import Request
from engine.sampling.grammar_cursor import GrammarCursor
from engine.sampling.grammar_pool import GrammarPool
from engine.step_plan import ScheduledSequence

_PATIENCE = 0.001
"""Seconds that a step waits for masks."""


class ConstrainedRequests:
    """Follows their outputs through their grammars, beside the model.

    Within a step: ``take_ready`` and ``take_failed``, then, once it is planned, ``ask``, and when the logits are there
    ``wait``; ``commit`` for each sequence that goes on. Whose mask is late is stalled until it has come: it computes
    nothing, and nobody else waits for it.
    """

    def __init__(self, pool: GrammarPool) -> None:
        self._pool = pool
        self._running: dict[str, Request] = {}

    @property
    def waiting(self) -> Collection[str]:
        """The ids of requests that wait for their grammar to be compiled."""
        return self._pool.waiting.keys()

    def start(self) -> None:
        """Load what every grammar needs, in a process of its own."""
        self._pool.start()

    def add(self, request: Request) -> None:
        """A request arrives; its grammar is compiled, if it is not yet."""
        self._pool.add(request)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._pool.forget(request_id)
        request = self._running.pop(request_id, None)
        if request is not None and request.grammar is not None:
            request.grammar.end()

    def take_ready(self) -> Iterator[tuple[Request, str | None]]:
        """The requests whose grammar is compiled, or why it cannot be enforced."""
        for request, result in self._pool.take_ready():
            if isinstance(result, GrammarCursor):
                request.grammar = result
                self._running[request.request_id] = request
                yield request, None
            else:
                yield request, result

    def take_failed(self) -> list[tuple[Request, str]]:
        """The running requests that cannot go on, with the reason; the others are stalled, or stalled no longer."""
        failed, now = [], time.monotonic()
        for request in self._running.values():
            cursor = _cursor(request)
            cursor.give_up(now)
            if cursor.failure is not None:
                failed.append((request, cursor.failure))
            else:
                request.is_stalled = not cursor.is_known and (request.is_stalled or cursor.is_slow)
        return failed

    def ask(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Ask for the masks of a step, and for those of sequences that wait for theirs."""
        if not self._running:
            return
        drafts = {
            sequence.request.request_id: sequence.token_ids[sequence.num_known :]
            for sequence in sequences
            if sequence.num_draft_tokens and sequence.request.grammar is not None
        }
        for request_id, request in self._running.items():
            cursor = _cursor(request)
            cursor.ask([] if cursor.is_slow else drafts.get(request_id, []))
        self._pool.flush()

    def wait(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Give the masks of a step a moment to come, but those that are known to take long."""
        if not self._running:
            return
        cursors = (sequence.request.grammar for sequence in sequences if sequence.num_sampled)
        self._pool.wait([cursor for cursor in cursors if cursor is not None and not cursor.is_slow], _PATIENCE)

    def commit(self, request: Request, token_ids: list[int]) -> None:
        """The output of a request has got these tokens, and goes on; nothing happens without a grammar."""
        if request.grammar is not None:
            request.grammar.commit(token_ids)


def num_choosable(sequence: ScheduledSequence) -> int:
    """Rows of a sequence from which tokens can be chosen: those whose masks are known, where there is a grammar."""
    cursor = sequence.request.grammar
    if cursor is None:
        return sequence.num_sampled
    return min(sequence.num_sampled, cursor.num_masks_for(sequence.draft_token_ids))


def _cursor(request: Request) -> GrammarCursor:
    assert request.grammar is not None
    return request.grammar
