"""Conversations as published traces have them: when they begin, how long their turns are, and the pauses between.

``conversations.csv.gz`` is made from Mooncake's conversation trace (Qin et al., FAST '25; FAST25-release/traces in
github.com/kvcache-ai/Mooncake; Apache License 2.0): requests of one hour, which are joined to conversations by their
prefix hashes. ``arrivals.csv.gz`` are the requests in each second of Azure's conversation trace
of 2023 (Patel et al., "Splitwise", ISCA 2024, github.com/Azure/AzurePublicDataset, CC-BY 4.0).

``python -m benchmarks.fleet.simulation.traces conversation_trace.jsonl AzureLLMInferenceTrace_conv.csv`` makes them.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

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
        """What its client calls its session."""
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
    """The turns of all conversations of the trace."""
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


def _join(requests: list[dict[str, Any]]) -> Iterator[tuple[int, int, int, int]]:
    """Conversation, pause, new tokens and output of each turn.

    A request goes on with the conversation whose last prompt it has in it, but for the last, partly filled block.
    """
    newest: dict[int, int] = {}
    of_request: list[tuple[int, bool]] = []
    ends: dict[int, int] = {}
    conversations = 0
    for number, one in enumerate(requests):
        hashes = one["hash_ids"]
        depth = next((d for d in range(len(hashes) - 1, 0, -1) if hashes[d] in newest), 0)
        before = newest[hashes[depth]] if depth else None
        goes_on = (
            before is not None
            and depth + 1 >= len(requests[before]["hash_ids"]) - 1
            and ends[of_request[before][0]] == before
            and one["input_length"] > requests[before]["input_length"]
        )
        if goes_on and before is not None:
            conversation, last = of_request[before][0], requests[before]
            pause = (one["timestamp"] - last["timestamp"]) // 1000
            new = max(1, one["input_length"] - last["input_length"] - last["output_length"])
        else:
            conversation, pause, new = conversations, 0, max(1, one["input_length"] - _BLOCK)
            conversations += 1
        of_request.append((conversation, goes_on))
        ends[conversation] = number
        newest |= dict.fromkeys(hashes, number)
        yield conversation, pause, new, one["output_length"]


def main(
    mooncake: Annotated[Path, typer.Argument(help="conversation_trace.jsonl.")],
    azure: Annotated[Path, typer.Argument(help="AzureLLMInferenceTrace_conv.csv.")],
) -> None:
    """Make the two files."""
    requests = [json.loads(line) for line in mooncake.read_text().splitlines()]
    rows = sorted(_join(requests), key=lambda row: row[0])
    with gzip.open(_CONVERSATIONS, "wt", newline="") as out:
        csv.writer(out).writerows(rows)
    with azure.open() as lines:
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in csv.DictReader(lines)]
    counts = Counter(int(time - times[0]) for time in times)
    with gzip.open(_ARRIVALS, "wt") as out:
        out.writelines(f"{counts[second]}\n" for second in range(max(counts) + 1))


if __name__ == "__main__":
    typer.run(main)
