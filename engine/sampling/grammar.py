"""Constrained output (JSON, JSON Schema) through xgrammar: compiled grammars and per-request matchers."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
import xgrammar

from engine.messages import Grammar

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

_MAX_CACHED_GRAMMARS = 64


class GrammarError(ValueError):
    """A schema that cannot be compiled; the message is fit for the client."""


class GrammarMatcher:
    """Where one request's output stands in its grammar.

    Once the grammar is complete and its end token was taken, only end tokens remain allowed.
    """

    def __init__(self, compiled: xgrammar.CompiledGrammar, end_token_ids: tuple[int, ...]) -> None:
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._end_token_ids = end_token_ids
        self._taken_after_end = 0

    def accept(self, token_id: int) -> bool:
        """Take one token; False, and no change, if the grammar does not allow it."""
        if not self._matcher.is_terminated():
            return bool(self._matcher.accept_token(token_id))
        if token_id not in self._end_token_ids:
            return False
        self._taken_after_end += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        """Give back the latest ``num_tokens`` tokens."""
        after_end = min(num_tokens, self._taken_after_end)
        self._taken_after_end -= after_end
        if num_tokens > after_end:
            self._matcher.rollback(num_tokens - after_end)

    def fill_bitmask(self, bitmask: torch.Tensor) -> None:
        """Write the allowed next tokens into ``bitmask`` ([1, ceil(V / 32)] int32, on the CPU)."""
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bitmask)
            return
        words = bitmask.zero_().numpy().view(np.uint32)
        for token_id in self._end_token_ids:
            words[0, token_id // 32] |= np.uint32(1 << token_id % 32)

    def only_end_tokens(self, bitmask: torch.Tensor) -> bool:
        """Whether ``bitmask`` as filled allows end tokens and nothing else."""
        words = bitmask.numpy().view(np.uint32)[0].copy()
        for token_id in self._end_token_ids:
            words[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        return not words.any()


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the most recently used.

    ``vocab_size`` is the model's, which may be padded beyond the tokenizer's; padding is never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._end_token_ids = tuple(sorted(tokenizer.eos_token_ids))
        vocabulary = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        info = xgrammar.TokenizerInfo(
            vocabulary[:vocab_size],
            xgrammar.VocabType.RAW,
            vocab_size=vocab_size,
            stop_token_ids=list(self._end_token_ids),
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._cache: OrderedDict[Grammar, xgrammar.CompiledGrammar] = OrderedDict()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of ``grammar``; raises ``GrammarError``."""
        if grammar not in self._cache:
            self._cache[grammar] = self._compile(grammar)
            if len(self._cache) > _MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return GrammarMatcher(self._cache[grammar], self._end_token_ids)

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.schema
        if schema is None:
            raise GrammarError("response_format json_schema needs a schema")
        try:
            return self._compiler.compile_json_schema(schema, strict_mode=grammar.kind == "json_schema")
        except (RuntimeError, ValueError) as error:
            raise GrammarError(f"the JSON schema cannot be used: {str(error).splitlines()[0]}") from error
