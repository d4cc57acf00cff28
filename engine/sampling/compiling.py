"""Requests that wait for their grammar: it is compiled beside the step loop, since that can take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from engine.sampling.grammar import CompiledGrammar, GrammarCompiler

if TYPE_CHECKING:
    from engine.request import Request


class CompilingRequests:
    """In the order of their arrival."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._waiting: dict[str, tuple[Request, Future[CompiledGrammar]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        """Their ids."""
        return iter(self._waiting)

    def add(self, request: Request) -> None:
        """Have the request's grammar compiled, if it is not yet."""
        assert request.sampling.grammar is not None
        compiled = self._compiler.compile(request.sampling.grammar, request.tenant)
        self._waiting[request.request_id] = request, compiled

    def take_ready(self) -> list[tuple[Request, Future[CompiledGrammar]]]:
        """Those that wait no longer. What they waited for, not what the compiler would give now: it forgets."""
        ready = [each for each in self._waiting.values() if each[1].done()]
        for request, _ in ready:
            del self._waiting[request.request_id]
        return ready

    def forget(self, request_id: str) -> None:
        """A request is gone; a grammar that only it waited for is not compiled, unless that has begun."""
        if request_id not in self._waiting:
            return
        request, compiled = self._waiting.pop(request_id)
        if request.sampling.grammar is not None and all(other is not compiled for _, other in self._waiting.values()):
            self._compiler.give_up(request.sampling.grammar, compiled)
