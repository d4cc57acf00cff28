"""The requests whose output a grammar constrains, and the masks that each step needs of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import structlog

from evospec.engine.request import Request
from evospec.engine.sampling.grammar_cursor import GRAMMAR_FAILED, GrammarCursor
from evospec.engine.sampling.grammar_pool import GrammarPool
from evospec.engine.step import ScheduledSequence

log = structlog.get_logger(__name__)

_PATIENCE = 0.001
"""Seconds that a step waits for masks."""


class ConstrainedRequests:
    """Follows their outputs through their grammars, beside the model, from when ``pool`` has compiled these.

    Within a step: ``follow``, then, once it is planned, ``ask``, and when the logits are there ``wait``; and
    ``GrammarCursor.commit`` for each sequence that goes on. Whose mask is late is stalled until it has come: it
    computes nothing, and nobody else waits for it.
    """

    def __init__(self, pool: GrammarPool) -> None:
        self._pool = pool
        self._running: dict[str, tuple[Request, GrammarCursor]] = {}

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._pool.forget(request_id)
        if (running := self._running.pop(request_id, None)) is not None:
            running[1].end()

    def follow(self) -> Iterator[tuple[Request, str | None]]:
        """The requests that begin, their grammar being compiled, and those that end, with the reason."""
        for request, result in self._pool.take_ready():
            if isinstance(result, GrammarCursor):
                request.grammar = result
                self._running[request.request_id] = request, result
                yield request, None
            else:
                yield request, result
        now = time.monotonic()
        for request, cursor in [*self._running.values()]:  # those that end are forgotten meanwhile
            cursor.give_up(now)
            if cursor.failure is not None:
                yield request, cursor.failure
            else:
                request.is_stalled = not cursor.is_known and (request.is_stalled or cursor.is_slow)

    def ask(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Ask for the masks of a step, and for those of sequences that wait for theirs."""
        if not self._running:
            return
        drafts = {sequence.request: sequence.draft_token_ids for sequence in sequences}
        for request, cursor in self._running.values():
            try:
                cursor.ask([] if cursor.is_slow else drafts.get(request, []))
            except Exception:
                log.exception("a grammar cannot be enforced", request=request.request_id)
                cursor.failure = GRAMMAR_FAILED
        self._pool.flush()

    def wait(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Give the masks of a step a moment to come, but those that are known to take long."""
        if not self._running:
            return
        cursors = (sequence.request.grammar for sequence in sequences if sequence.num_sampled)
        self._pool.wait([cursor for cursor in cursors if cursor is not None and not cursor.is_slow], _PATIENCE)


def num_choosable(sequence: ScheduledSequence) -> int:
    """Rows of a sequence from which tokens can be chosen: those whose masks are known, where there is a grammar."""
    cursor = sequence.request.grammar
    if cursor is None:
        return sequence.num_sampled
    return min(sequence.num_sampled, cursor.num_masks_for(sequence.draft_token_ids))
