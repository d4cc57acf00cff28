"""Questions of public collections, as training prompts: ``python -m benchmarks.prompts.tasks T0 GSM8K``.

People ask for summaries, answers about a text and arithmetic, and not only about nouns and functions. T0's training
tasks (P3, Apache-2.0) are in github.com/yizhongw/self-instruct, the training questions of GSM8K (MIT) in
github.com/openai/grade-school-math. Nothing that mentions law, licences or medicine is taken, and nothing that shares
eight words in a row with an evaluation prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.prompts.build import Prompt, shingles, stable_hash, training_prompt, write
from benchmarks.prompts.sets import evaluation_shingles
from benchmarks.prompts.sources import CACHE
from benchmarks.prompts.text import LEFT_OUT

TASKS_PATH = CACHE / "tasks.jsonl"
ONE_IN = 3
"""GSM8K's share of all prompts, at most."""


def t0_prompts(directory: Path) -> Iterator[Prompt]:
    """Of a checkout of yizhongw/self-instruct: all templates' prompts."""
    for path in sorted((directory / "data/finetuning/t0_train_50k/data_per_template").glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            text, about = json.loads(line)["prompt"], ("yizhongw/self-instruct", "Apache-2.0")
            yield training_prompt(f"t0/{path.stem}/{number}", "general", text.strip(), text, *about)


def gsm8k_prompts(directory: Path) -> Iterator[Prompt]:
    """Of a checkout of openai/grade-school-math: the training questions."""
    for number, line in enumerate((directory / "grade_school_math/data/train.jsonl").read_text().splitlines()):
        text, about = json.loads(line)["question"], ("openai/grade-school-math", "MIT")
        yield training_prompt(f"gsm8k/{number}", "general", text.strip(), text, *about)


def usable(prompts: Iterable[Prompt], known: set[tuple[str, ...]]) -> list[Prompt]:
    """Those that may be trained on, in the order of their hashes; each text once."""
    texts = {prompt.passage: prompt for prompt in prompts if prompt.passage.strip()}
    kept = (one for text, one in texts.items() if not LEFT_OUT.search(text) and known.isdisjoint(shingles(text)))
    return sorted(kept, key=lambda prompt: stable_hash("tasks", prompt.id))


def main(
    t0: Annotated[Path, typer.Argument(help="Checkout of github.com/yizhongw/self-instruct.")],
    gsm8k: Annotated[Path, typer.Argument(help="Checkout of github.com/openai/grade-school-math.")],
) -> None:
    """Writes ``tasks.jsonl`` into the cache, for ``adapters.training.generate --prompts``."""
    known = evaluation_shingles()
    general, sums = usable(t0_prompts(t0), known), usable(gsm8k_prompts(gsm8k), known)
    chosen = general + sums[: len(general) // (ONE_IN - 1)]
    write(TASKS_PATH, sorted(chosen, key=lambda prompt: stable_hash("order", prompt.id)))
    print(f"{len(chosen)} prompts in {TASKS_PATH}")


if __name__ == "__main__":
    typer.run(main)
