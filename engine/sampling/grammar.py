"""Constrained output (JSON, JSON Schema) through xgrammar: compiled grammars and per-request matchers."""

from __future__ import annotations

import re
from collections import OrderedDict
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import xgrammar
from numpy.typing import NDArray

from engine.messages import Grammar
from engine.sampling.fair_thread import FairThread
from engine.sampling.json_schema import GrammarError, check_json_schema

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

_MAX_CACHED_GRAMMARS = 64
_MAX_CACHED_BYTES = 256 * 1024**2
"""Of those together; one may take tens of megabytes (the bounds of its strings, times the vocabulary)."""
_LOG_PREFIX = re.compile(r"^\[[^]]*\] \S+: ")


class CompiledGrammar:
    """A grammar for one vocabulary; makes matchers."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, end_token_ids: frozenset[int], excluded: frozenset[int]):
        self.compiled = compiled
        self.num_bytes: int = compiled.memory_size_bytes
        self.end_token_ids = end_token_ids
        self.excluded_token_ids = excluded

    def matcher(self) -> GrammarMatcher:
        """A matcher at the grammar's start."""
        return GrammarMatcher(self)


class GrammarMatcher:
    """Where one request's output stands in its grammar.

    Once the grammar is complete and its end token was taken, only end tokens remain allowed.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher = xgrammar.GrammarMatcher(grammar.compiled)
        self._taken_after_end = 0

    def accept(self, token_id: int) -> bool:
        """Take one token; False, and no change, if the grammar does not allow it."""
        if self._matcher.is_terminated():
            if token_id not in self._grammar.end_token_ids:
                return False
            self._taken_after_end += 1
            return True
        # xgrammar refuses these too, but logs a warning each time.
        return token_id not in self._grammar.excluded_token_ids and bool(self._matcher.accept_token(token_id))

    def rollback(self, num_tokens: int) -> None:
        """Give back the latest ``num_tokens`` tokens."""
        after_end = min(num_tokens, self._taken_after_end)
        self._taken_after_end -= after_end
        if num_tokens > after_end:
            self._matcher.rollback(num_tokens - after_end)

    def fill_bitmask(self, bitmask: NDArray[np.int32], row: int) -> None:
        """Write the allowed next tokens into a row of ``bitmask`` [rows, ceil(V / 32)]."""
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bitmask, row)
            return
        bitmask[row] = 0
        words = bitmask[row].view(np.uint32)
        for token_id in self._grammar.end_token_ids:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)


def _without_control(text: bytes) -> bytes:
    """The token's bytes, or nothing (never allowed) if there is a control character among them.

    JSON needs none. xgrammar lets them into strings with a ``maxLength``, where JSON forbids them, and small
    models would write line feeds between two tokens of JSON without end.
    """
    return b"" if any(byte < 0x20 for byte in text) else text


class GrammarCompiler:
    """Compiles grammars for one vocabulary in a thread of its own, where tenants take turns; keeps those last used.

    An unusual schema takes seconds to compile; xgrammar releases the interpreter lock meanwhile.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = [_without_control(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)]
        self._end_token_ids = frozenset(tokenizer.eos_token_ids)
        self._excluded = frozenset(i for i, text in enumerate(vocabulary) if not text) - self._end_token_ids
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=sorted(self._end_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._thread: FairThread[CompiledGrammar] = FairThread("grammar")
        self._cache: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()

    def compile(self, grammar: Grammar, tenant: str = "") -> Future[CompiledGrammar]:
        """The compiled grammar, from the cache or when it is ready; its result may raise ``GrammarError``."""
        if grammar not in self._cache:
            self._cache[grammar] = Future()
        self._cache.move_to_end(grammar)
        while len(self._cache) > _MAX_CACHED_GRAMMARS or (
            len(self._cache) > 1 and self._num_bytes() > _MAX_CACHED_BYTES
        ):
            self._cache.popitem(last=False)
        compiled = self._cache[grammar]
        if not compiled.done():  # also if it waits: it need not wait for the turn of the tenant that asked first
            self._thread.submit(tenant, compiled, partial(self._compile, grammar))
        return compiled

    def give_up(self, grammar: Grammar, compiled: Future[CompiledGrammar]) -> None:
        """Nobody waits for what ``compile`` gave any more: others need not wait for it either, if it has not begun."""
        if compiled.cancel() and self._cache.get(grammar) is compiled:
            del self._cache[grammar]

    def _num_bytes(self) -> int:
        """Of the grammars that are kept and compiled."""
        done = (one for one in self._cache.values() if one.done() and not one.cancelled() and one.exception() is None)
        return sum(one.result().num_bytes for one in done)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        is_object = grammar.kind == "json_object"
        schema = '{"type": "object"}' if is_object else grammar.schema or ""
        check_json_schema(schema)
        try:
            # Strict: objects hold no properties beyond those the schema names, unless it says so.
            compiled = self._compiler.compile_json_schema(schema, strict_mode=not is_object)
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or ["xgrammar does not say why"])[0]  # of a number that is too large
            raise GrammarError(f"the JSON schema cannot be used: {_LOG_PREFIX.sub('', first)}") from error
        return CompiledGrammar(compiled, self._end_token_ids, self._excluded)
