"""Constrained output (JSON, JSON Schema) through xgrammar: compiled grammars, and matchers that follow an output.

Used in the processes of ``engine.sampling.grammar_process``, never in the engine's own: what a client sends can make
any call here take minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import xgrammar
from numpy.typing import NDArray

from engine.messages import Grammar
from engine.sampling.json_schema import GrammarError, check_json_schema
from engine.sampling.patterns import rewrite_patterns

_LOG_PREFIX = re.compile(r"^\[[^]]*\] \S+: ")


class CompiledGrammar:
    """A grammar for one vocabulary; makes matchers."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, end_token_ids: frozenset[int], excluded: frozenset[int]):
        self.compiled = compiled
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
    """Compiles grammars for one vocabulary.

    Args:
        token_bytes: the bytes of each token, by token id.
        end_token_ids: the tokens that end an output.
    """

    def __init__(self, token_bytes: Sequence[bytes], end_token_ids: Iterable[int]) -> None:
        vocabulary = [_without_control(token) for token in token_bytes]
        self._end_token_ids = frozenset(end_token_ids)
        self._excluded = frozenset(i for i, text in enumerate(vocabulary) if not text) - self._end_token_ids
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=sorted(self._end_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The compiled grammar; raises ``GrammarError``. Nothing bounds the time and the memory that it takes."""
        is_object = grammar.kind == "json_object"
        schema = '{"type": "object"}' if is_object else grammar.schema or ""
        check_json_schema(schema)
        try:
            # Strict: objects hold no properties beyond those the schema names, unless it says so.
            compiled = self._compiler.compile_json_schema(rewrite_patterns(schema), strict_mode=not is_object)
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or ["xgrammar does not say why"])[0]  # of a number that is too large
            raise GrammarError(f"the JSON schema cannot be used: {_LOG_PREFIX.sub('', first)}") from error
        return CompiledGrammar(compiled, self._end_token_ids, self._excluded)
