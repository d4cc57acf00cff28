"""What enters a tail, and when: at a sequence's start, and with every verified step (arXiv 2605.27390, and ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.config import DynamicConfig
from engine.vocab.core_set import CoreSet
from engine.vocab.replacement import SlotWrite
from engine.vocab.semantic_search import SemanticSearch
from engine.vocab.session_vocab import MAX_INSERTIONS, MAX_PROMPT_TOKENS, SessionVocab, Source
from engine.vocab.tail_writer import TailWriter
from engine.vocab.tenant_graphs import TenantGraphs
from engine.vocab.tenant_memory import TenantMemory

TopK = Callable[[], NDArray[np.int32]]
"""The target's most likely tokens at some positions: [n, k], best first."""


class Retrieval:
    """Fills tails by the sources that are switched on.

    Args:
        options: the switches.
        core: tokens that need no slot.
        writer: where changed slots go.
        memory: what each tenant's sessions had in common; None: off.
        graphs: what follows what; None: off.
        search: the semantic index; None: off.
    """

    def __init__(
        self,
        options: DynamicConfig,
        core: CoreSet,
        writer: TailWriter,
        memory: TenantMemory | None,
        graphs: TenantGraphs | None,
        search: SemanticSearch | None,
    ) -> None:
        self._options, self._core, self._writer = options, core, writer
        self._memory, self._graphs, self._search = memory, graphs, search

    def start(self, vocab: SessionVocab, prompt: Sequence[int], past: Sequence[int]) -> None:
        """Fill a new tail with the prompt's own tokens, then the session's, then the tenant's, while there is room.

        Args:
            vocab: of the sequence; its tail is empty.
            prompt: all its tokens.
            past: the tail with which the session's last request ended.
        """
        recent = prompt[: -MAX_PROMPT_TOKENS - 1 : -1] if self._options.in_context else ()
        wanted: list[tuple[Source, Sequence[int]]] = [("context", recent), ("snapshot", past)]
        if self._memory is not None:
            size = vocab.room + len(past)
            wanted.append(("tenant", self._memory.top(vocab.owner.tenant, vocab.owner.domain, size)))
        left, taken, chosen = vocab.room, set[int](), []
        for source, token_ids in wanted:
            new = [token_id for token_id in dict.fromkeys(vocab.outside(token_ids)) if token_id not in taken][:left]
            left -= len(new)
            taken.update(new)
            chosen.append((source, new))
        for source, token_ids in reversed(chosen):  # what comes last is kept longest
            self._put(vocab, vocab.insert(token_ids, source, vocab.room))

    def bootstrap(self, vocab: SessionVocab, likely: NDArray[np.int32]) -> None:
        """Fill free slots with the target's most likely tokens [n, k], the best of all positions first."""
        self._put(vocab, vocab.insert(self._core.outside_array(likely.T), "target", vocab.room))

    def fill(self, vocab: SessionVocab) -> None:
        """Fill free slots with any tokens."""
        enough = range(min(self._core.size + vocab.room, self._core.vocab_size))
        self._put(vocab, vocab.insert(enough, "tenant", vocab.room))

    def catch_up(self, vocab: SessionVocab, tokens: Sequence[int]) -> None:
        """Insert tokens of steps that nobody followed, the latest first, where there is room or by the usual few."""
        if self._options.in_context:
            limit = max(vocab.room, MAX_INSERTIONS)
            self._put(vocab, vocab.insert(tokens[: -MAX_PROMPT_TOKENS - 1 : -1], "context", limit))

    def follow(self, vocab: SessionVocab, verified: Sequence[int], missed: Sequence[int], top_k: TopK) -> None:
        """Insert what a verified step speaks for: at most ``MAX_INSERTIONS`` tokens that are new to the tail.

        Args:
            vocab: whose the tail is.
            verified: the step's tokens.
            missed: those that could not have been drafted.
            top_k: the target's most likely tokens where ``verified`` were chosen.
        """
        if vocab.tail is None:
            return
        left = MAX_INSERTIONS
        if self._options.in_context:
            left -= self._put(vocab, vocab.insert(verified, "context", left))
        seeds = list(missed)
        signal = self._options.target_signal
        if signal == "every" or (missed and signal == "events"):
            top = top_k()
            # Column by column: the best of each position first.
            left -= self._put(vocab, vocab.insert(self._core.outside_array(top.T), "target", left))
            places = [place for place, token_id in enumerate(verified) if token_id in missed]
            seeds += top[places].T.ravel().tolist()
        if missed and self._graphs is not None:
            graph = self._graphs.of(vocab.owner.tenant)
            near = [neighbour for seed in dict.fromkeys(seeds) for neighbour in graph.neighbours(seed)]
            self._put(vocab, vocab.insert(near, "graph", left))

    def learn(self, vocab: SessionVocab, verified: Sequence[int], before: Sequence[int]) -> None:
        """Let the tenant's memory and graph follow verified tokens; ``before``: the tokens right before them."""
        if self._memory is not None:
            self._memory.add(vocab.owner.tenant, vocab.owner.domain, vocab.outside(verified))
        if self._graphs is not None:
            self._graphs.of(vocab.owner.tenant).observe(verified, before)

    def ask_neighbours(self, request_id: str, hidden: NDArray[np.float32]) -> None:
        """Search for the tokens nearest to the state [d] from which a token should have been drafted, but could not."""
        if self._search is not None:
            self._search.ask(request_id, hidden)

    def take_neighbours(self, sessions: dict[str, SessionVocab]) -> None:
        """Insert what searches have found by now, for the sequences that are still there."""
        for request_id, token_ids in self._search.take() if self._search is not None else ():
            if request_id in sessions:
                vocab = sessions[request_id]
                self._put(vocab, vocab.insert(token_ids, "semantic", MAX_INSERTIONS))

    def _put(self, vocab: SessionVocab, writes: Sequence[SlotWrite]) -> int:
        self._writer.put(vocab.slab, writes)
        return len(writes)
