"""Constrained output (JSON, calls of tools) through xgrammar: compiled grammars, and what follows an output in them.

What a client sends can make any call here take minutes: ``engine.sampling.grammar_process`` bounds that, and
``engine.sampling.grammar_in_place`` calls only where it is known to be cheap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evospec.engine.messages import Grammar
from evospec.engine.sampling.grammar_messages import SECONDS_PER_MASK, SPARE_SECONDS, Failure
from evospec.engine.sampling.json_schema import (
    GrammarError,
    check_json_schema,
    has_string_lengths,
    rewrite_pattern,
    rewrite_patterns,
)
from evospec.engine.sampling.xgrammar_alone import xgrammar

_WHAT = {"regex": "regular expression", "grammar": "grammar"}
_WHITESPACE = 1
"""Spaces in a row that JSON may have. It is in one line, where small models would go on with spaces for line feeds."""
_LOG_PREFIX = re.compile(r"^\[[^]]*\] \S+: ")


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar for one vocabulary."""

    compiled: xgrammar.CompiledGrammar
    end_token_ids: frozenset[int]
    excluded_token_ids: frozenset[int]
    """Tokens without text that end nothing: never allowed."""


class GrammarMatcher:
    """Where one request's output stands in its grammar; at first, at the grammar's start.

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


class GrammarSequence:
    """Follows an output through its grammar, and counts what that costs.

    Args:
        matcher: at the grammar's start.
        masks: [1 + most drafts, words] int32, a bit a token; ``follow`` writes here.
        clock: seconds of computing so far; called before and after each mask.
    """

    def __init__(self, matcher: GrammarMatcher, masks: NDArray[np.int32], clock: Callable[[], float]) -> None:
        self.failure: Failure = ""
        self.last_seconds = 0.0
        """What the latest mask after the output took."""
        self._matcher, self._masks, self._clock = matcher, masks, clock
        self._spent = 0.0
        self._num_computed = 0

    def follow(self, committed: Sequence[int], drafts: Sequence[int]) -> int:
        """Follow the output by the tokens it has got, and write the masks after it and after each draft.

        Returns how many masks are right: none after a failure, else one and one for each draft that is allowed.
        """
        started = self._clock()
        if committed or not self._num_computed:
            if not all(map(self._matcher.accept, committed)):
                self.failure = "contradiction"
            ended = self._fill(0, started)
            self.last_seconds, started = ended - started, ended
        return 0 if self.failure else 1 + self._look_ahead(drafts, started)

    def _look_ahead(self, drafts: Sequence[int], started: float) -> int:
        """Masks after each draft, up to the first that is not allowed or has nothing after it; returns their number."""
        taken = num_masks = 0
        while taken == num_masks < len(drafts) and self._matcher.accept(drafts[taken]):
            taken += 1
            started = self._fill(taken, started)
            num_masks += not self.failure and bool(self._masks[taken].any())
        if taken:
            self._matcher.rollback(taken)
        return num_masks

    def _fill(self, row: int, started: float) -> float:
        """Write one mask, unless the sequence has failed. ``started``: when its time began; returns when it ended."""
        if not self.failure:
            self._matcher.fill_bitmask(self._masks, row)
        ended = self._clock()
        self._spent += ended - started
        self._num_computed += 1
        if not self.failure and self._spent > SPARE_SECONDS + SECONDS_PER_MASK * self._num_computed:
            self.failure = "spent"
        return ended


def _without_control(text: bytes, allowed: bytes = b"") -> bytes:
    """The token's bytes, or nothing (never allowed) if there is a control character among them but those ``allowed``.

    JSON needs none. xgrammar lets them into strings with a ``maxLength``, where JSON forbids them, and small
    models would write line feeds between two tokens of JSON without end.
    """
    return b"" if any(byte < 0x20 and byte not in allowed for byte in text) else text


class GrammarCompiler:
    """Compiles grammars for one ``Vocabulary``."""

    def __init__(self, token_bytes: Sequence[bytes], end_token_ids: Iterable[int]) -> None:
        self._token_bytes = list(token_bytes)
        self._end_token_ids = frozenset(end_token_ids)
        self._for_json = _VocabularyCompiler([_without_control(token) for token in token_bytes], self._end_token_ids)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """The compiled grammar; raises ``GrammarError``. Nothing bounds the time and the memory that it takes."""
        if grammar.kind in ("json_object", "json_schema"):
            is_object = grammar.kind == "json_object"
            schema = '{"type": "object"}' if is_object else grammar.schema or ""
            check_json_schema(schema)
            # Strict: objects hold no properties beyond those the schema names, unless it says so.
            return self._for_json.compile(
                "json_schema", rewrite_patterns(schema), strict_mode=not is_object, max_whitespace_cnt=_WHITESPACE
            )
        kind: str = grammar.kind
        text, vocabulary = grammar.schema or "", self._token_bytes
        if kind == "ebnf":
            kind = "grammar"
        elif kind == "regex":
            text = rewrite_pattern(text, to_ascii=False)
        elif has_string_lengths(text):  # a structural tag: text beside JSON, with line feeds only where JSON is at risk
            vocabulary = [_without_control(token, allowed=b"\n") for token in vocabulary]
        # Such output is rare, and this made in a tenth of a second.
        return _VocabularyCompiler(vocabulary, self._end_token_ids).compile(kind, text)


class _VocabularyCompiler:
    """Compiles for tokens of which those without bytes are never allowed, unless they end an output."""

    def __init__(self, vocabulary: list[bytes], end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids
        self._excluded = frozenset(i for i, text in enumerate(vocabulary) if not text) - end_token_ids
        info = xgrammar.TokenizerInfo(
            vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=sorted(end_token_ids)
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, text: str, **options: int) -> CompiledGrammar:
        """What xgrammar's ``compile_KIND`` makes of a text; raises ``GrammarError``."""
        try:
            compiled = getattr(self._compiler, f"compile_{kind}")(text, **options)
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or ["xgrammar does not say why"])[0]  # of a number that is too large
            what = _WHAT.get(kind, "JSON schema")
            raise GrammarError(f"the {what} cannot be used: {_LOG_PREFIX.sub('', first)}") from error
        return CompiledGrammar(compiled, self._end_token_ids, self._excluded)
