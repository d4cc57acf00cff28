"""What the pool of grammars costs while many requests wait for one; ``test_grammar.py`` has its processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from evospec.engine.messages import Grammar
from evospec.engine.sampling import grammar_pool
from evospec.engine.sampling.grammar_pool import GrammarPool
from evospec.engine.text.tokenizer import Tokenizer
from tests.grammars import with_grammar

NUM_REQUESTS = 100


class CountedGrammar(Grammar, frozen=True):
    """Counts how often the text of two grammars is compared."""

    comparisons = 0

    def __hash__(self) -> int:
        return hash(self.schema)

    def __eq__(self, other: object) -> bool:
        CountedGrammar.comparisons += 1
        return isinstance(other, Grammar) and self.schema == other.schema


class Compiling(SimpleNamespace):
    """A process that compiles forever, or until it is ended."""

    is_compiling, is_idle, is_cheap = True, False, False
    num_bytes, error, was_ended = 0, None, False

    def flush(self) -> None: ...

    def receive(self) -> None: ...

    def kill(self) -> None:
        self.was_ended = True


def test_requests_that_wait_for_one_grammar_compare_it_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the engine looks for those that are ready, and whoever ends; the last one ends the process."""
    process = Compiling()
    monkeypatch.setattr(grammar_pool, "GrammarProcess", lambda *_: process)
    monkeypatch.setattr(GrammarPool, "start", lambda pool: setattr(pool, "_control", object()))
    monkeypatch.setattr(CountedGrammar, "comparisons", 0)
    pool = GrammarPool(cast(Tokenizer, SimpleNamespace(vocab_size=32)), num_slots=1)
    for number in range(NUM_REQUESTS):
        pool.add(with_grammar(CountedGrammar("ebnf", "x" * 1000), str(number)))
    for _ in range(10):
        assert not pool.take_ready()
    for number in range(NUM_REQUESTS):
        assert not process.was_ended
        pool.forget(str(number))
    assert process.was_ended
    assert not pool.waiting
    assert CountedGrammar.comparisons <= 2 * NUM_REQUESTS
