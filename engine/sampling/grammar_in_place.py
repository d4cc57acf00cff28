"""Grammars whose masks the step computes itself: ten microseconds each, where to wake a process takes seventy.

Only for schemas that ``engine.sampling.ordinary_schema`` admits and that a process has found to be cheap.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import structlog
import torch  # noqa: F401 - first: xgrammar loads tvm_ffi, which would be without torch then, for flashinfer too

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, GrammarSequence
from evospec.engine.sampling.grammar_cursor import GrammarCursor
from evospec.engine.sampling.grammar_messages import MASKS_PER_SLOT, Vocabulary

log = structlog.get_logger(__name__)

_NICE = 5
"""The engine's own thread goes first."""


class InPlaceCursor(GrammarCursor):
    """A ``GrammarCursor`` that has computed the masks when ``ask`` returns."""

    def __init__(self, grammar: InPlaceGrammar, compiled: CompiledGrammar, num_words: int) -> None:
        super().__init__(np.zeros((MASKS_PER_SLOT, num_words), dtype=np.int32))
        self._grammar, self._compiled = grammar, compiled
        self._output: list[int] = []
        """All tokens of the output that were asked about."""
        self._sequence = self._begin()

    def _begin(self) -> GrammarSequence:
        return GrammarSequence(GrammarMatcher(self._compiled), self.masks, time.thread_time)

    def allowed(self, draft_token_ids: list[int]) -> list[int]:
        self.ask(draft_token_ids)
        return draft_token_ids[: max(0, self.num_masks - 1)]

    def ask(self, draft_token_ids: list[int]) -> None:
        if self.failure is not None or (self.num_masks and draft_token_ids == self.drafts[: len(draft_token_ids)]):
            return
        new, self._committed, self.drafts = self._committed or [], None, draft_token_ids
        self._output += new
        try:
            num_masks = self._sequence.follow(new, draft_token_ids)
        except Exception:  # a matcher that has stopped within a token is of no use any more
            log.exception("a grammar's matcher has failed, and reads its output anew", tokens=len(self._output))
            self._sequence = self._begin()
            num_masks = self._sequence.follow(self._output, [])
        self._settle(num_masks, self._sequence.failure)

    def end(self) -> None:
        self._grammar.num_sequences -= 1


class InPlaceGrammar:
    """A grammar that is enforced in the engine itself; to the pool, it is like a ``GrammarProcess``."""

    def __init__(self, compiled: Future[CompiledGrammar], num_bytes: int, num_words: int) -> None:
        self.num_bytes = num_bytes
        self.num_sequences = 0
        self._compiled, self._num_words = compiled, num_words

    @property
    def is_compiling(self) -> bool:
        return not self._compiled.done()

    @property
    def is_idle(self) -> bool:
        return not self.is_compiling and not self.num_sequences

    def begin(self) -> InPlaceCursor:
        self.num_sequences += 1
        return InPlaceCursor(self, self._compiled.result(), self._num_words)

    def kill(self) -> None:
        pass


class InPlaceCompiler:
    """Compiles grammars in a thread of its own; xgrammar holds no interpreter lock meanwhile."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._compiler = GrammarCompiler(vocabulary.token_bytes, vocabulary.end_token_ids)
        self._thread = ThreadPoolExecutor(1, "grammar", os.nice, (_NICE,))  # Linux: of this thread alone
        self._num_words = -(-len(vocabulary.token_bytes) // 32)

    def compile(self, grammar: Grammar, num_bytes: int) -> InPlaceGrammar:
        """A grammar that a process has compiled already, in memory of ``num_bytes``."""
        return InPlaceGrammar(self._thread.submit(self._compiler.compile, grammar), num_bytes, self._num_words)
