"""Conversations as published traces have them: when they begin, how long their turns are, and the pauses between.

``conversations.csv.gz`` is made from Mooncake's conversation trace (Qin et al., FAST '25; FAST25-release/traces in
github.com/kvcache-ai/Mooncake; Apache License 2.0): requests of one hour, which are joined to conversations by their
prefix hashes. ``arrivals.csv.gz`` are the requests in each second of Azure's conversation trace
of 2023 (Patel et al., "Splitwise", ISCA 2024, github.com/Azure/AzurePublicDataset, CC-BY 4.0).
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

_CONVERSATIONS, _ARRIVALS = (Path(__file__).with_name(f"{name}.csv.gz") for name in ("conversations", "arrivals"))
_BLOCK = 512
"""Tokens that a hash of Mooncake's stands for; the first block is the same in all conversations."""


@dataclass(frozen=True)
class Turn:
    """``pause``: seconds after the answer before; ``new``: tokens of the prompt after the conversation so far."""

    pause: float
    new: int
    output: int


@dataclass(frozen=True)
class Conversation:
    """``start`` in seconds."""

    number: int
    start: float
    turns: list[Turn]

    @property
    def name(self) -> str:
        return f"conversation-{self.number}"


@dataclass(frozen=True)
class Scale:
    """By what the trace's lengths and pauses are divided, so that small replicas can serve them."""

    input: float = 32.0
    output: float = 4.0
    pause: float = 1.0
    longest: int = 8192
    """Tokens of a conversation; turns beyond are left out."""

    @property
    def shared(self) -> int:
        """Tokens with which all conversations begin."""
        return round(_BLOCK / self.input)


def make_conversations(rate: float, seconds: float, scale: Scale, seed: int = 0) -> list[Conversation]:
    """Conversations drawn from the trace, of which ``rate`` a second begin, more or fewer as in Azure's hour.

    Turns are left out that would begin after ``seconds`` even if answers took no time.
    """
    chance, templates = np.random.default_rng(seed), read_conversations(scale)
    counts = np.loadtxt(_ARRIVALS)
    which = chance.choice(len(counts), size=chance.poisson(rate * seconds), p=counts / counts.sum())
    starts = np.sort((which + chance.random(len(which))) * seconds / len(counts))
    drawn = chance.integers(len(templates), size=len(starts))
    return [
        Conversation(number, float(start), list(_begun(templates[template], seconds - start)))
        for number, (start, template) in enumerate(zip(starts, drawn, strict=True))
    ]


def _begun(turns: Iterable[Turn], seconds: float) -> Iterator[Turn]:
    for turn in turns:
        seconds -= turn.pause
        if seconds <= 0.0:
            return
        yield turn


def read_conversations(scale: Scale) -> list[list[Turn]]:
    with gzip.open(_CONVERSATIONS, "rt") as lines:
        rows = [tuple(map(int, row)) for row in csv.reader(lines)]
    found = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        turns, length = list[Turn](), scale.shared
        for _, pause, new, output in group:
            turn = Turn(pause / scale.pause, max(1, round(new / scale.input)), max(1, round(output / scale.output)))
            length += turn.new + turn.output
            if length > scale.longest:
                break
            turns.append(turn)
        if turns:
            found.append(turns)
    return found
