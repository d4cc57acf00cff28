"""What no training text may contain: eight words in a row of any evaluation prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.prompts.build import read_eval, shingles
from benchmarks.prompts.sets import evaluation_files


def evaluation_shingles(files: Sequence[Path] | None = None) -> set[tuple[str, ...]]:
    """Runs of words of all prompts: ``eval.jsonl``'s and those of ``files``; default: the grid's, ``*-eval.jsonl``."""
    return set[tuple[str, ...]]().union(*map(shingles, _texts(evaluation_files() if files is None else files)))


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for prompt in read_eval():
        yield prompt.passage
        yield from (message["content"] for message in prompt.messages)
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            yield from row.get("turns") or [row["prompt"]]
