"""Requests with a grammar, and the processes that enforce it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from evospec.engine.messages import Grammar, SamplingParams
from evospec.engine.request import Request
from evospec.engine.sampling.grammar_cursor import GrammarCursor
from evospec.engine.sampling.grammar_pool import GrammarPool


def schema(value: object) -> Grammar:
    """The grammar of a JSON Schema."""
    return Grammar("json_schema", json.dumps(value))


def with_grammar(grammar: Grammar, request_id: str = "r", tenant: str = "tenant") -> Request:
    """A request that has no other wish."""
    sampling = SamplingParams(max_tokens=1, seed=0, grammar=grammar)
    return Request(request_id=request_id, client_id=b"client", tenant=tenant, sampling=sampling, prompt_token_ids=[1])


def compiled(pool: GrammarPool, *requests: Request) -> dict[str, GrammarCursor | str]:
    """What becomes of requests, by id: a cursor, or why there is none."""
    for request in requests:
        pool.add(request)
    ready: dict[str, GrammarCursor | str] = {}
    while pool.waiting:
        ready |= {request.request_id: result for request, result in pool.take_ready()}
        time.sleep(0.001)
    return ready


def begin(pool: GrammarPool, request: Request) -> GrammarCursor:
    """Give the request its cursor, which knows the first mask."""
    cursor = compiled(pool, request)[request.request_id]
    assert isinstance(cursor, GrammarCursor), cursor
    request.grammar = cursor
    settle(pool, cursor)
    return cursor


def settle(pool: GrammarPool, cursor: GrammarCursor, drafts: Sequence[int] = ()) -> None:
    """Ask for the masks after the output and after each draft, and wait for them."""
    cursor.ask(list(drafts))
    while not cursor.is_answered:
        pool.wait([cursor], 1)
