"""How often greedy answers in bf16 are the same with and without speculation: ``python -m benchmarks.equality``.

In float32 they always are (tests/integration). In bf16 a product of many rows may round otherwise than one of few, and
where two tokens are nearly as likely that can decide. Plain decoding of several sequences at once has that freedom too,
so its share of equal answers, 1 against 8 at a time, is what the share with speculation is to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.drafting import NONE, Drafting
from benchmarks.common.environment import environment
from benchmarks.common.in_process import Engine
from benchmarks.common.machine import write_record
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.sets import mixed_prompts
from evospec.engine.config import MAX_SPECULATIVE_TOKENS
from evospec.engine.messages import SamplingParams

ALONE, TOGETHER = 1, 8

Answers = list[list[int]]


@dataclass(frozen=True)
class Equality:
    """Two ways to answer the same prompts. ``first_difference``: median position of the first token that differs."""

    first: str
    second: str
    prompts: int
    equal: int
    first_difference: float | None


def compare(name: str, answers: Answers, other_name: str, others: Answers) -> Equality:
    """Count the answers that are the same token for token."""
    differing = [(a, b) for a, b in zip(answers, others, strict=True) if a != b]
    places = [_first_difference(a, b) for a, b in differing]
    equal = len(answers) - len(differing)
    return Equality(name, other_name, len(answers), equal, median(places) if places else None)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((place for place, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def answer(engine: Engine, prompts: Sequence[Prompt], concurrency: int, max_tokens: int) -> Answers:
    """Greedy answers, whole groups of ``concurrency`` prompts one after the other."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0)
    groups = [prompts[start : start + concurrency] for start in range(0, len(prompts), concurrency)]
    return [tokens for group in groups for tokens in engine.generate(group, sampling, concurrency).answers]


def table_of(model: str, results: Sequence[Equality], max_tokens: int) -> Table:
    table = Table("answers", "compared with", title=f"{model}: greedy answers of up to {max_tokens} tokens")
    for header in ("prompts", "equal", "first difference (median token)"):
        table.add_column(header, justify="right")
    for r in results:
        place = "–" if r.first_difference is None else f"{r.first_difference:.0f}"
        table.add_row(r.first, r.second, str(r.prompts), f"{r.equal} ({r.equal / r.prompts:.1%})", place)
    return table


def compare_ways(model: str, drafting: Drafting, prompts: Sequence[Prompt], max_tokens: int) -> list[Equality]:
    """Plain decoding at two batch sizes, and speculation against plain decoding at each of them."""
    answers: dict[tuple[str, int], Answers] = {}
    for mode in (NONE, "full"):
        engine = Engine(drafting.config(model, mode))
        dtype = engine.core.introduction.dtype
        if dtype != "bfloat16":
            raise ValueError(f"the engine computes in {dtype}: there is nothing to measure")
        for concurrency in (ALONE, TOGETHER):
            answers[mode, concurrency] = answer(engine, prompts, concurrency, max_tokens)
    plain, more = f"plain, {ALONE} at a time", f"plain, {TOGETHER} at a time"
    return [
        compare(plain, answers[NONE, ALONE], more, answers[NONE, TOGETHER]),
        compare(plain, answers[NONE, ALONE], f"speculation, {ALONE} at a time", answers["full", ALONE]),
        compare(more, answers[NONE, TOGETHER], f"speculation, {TOGETHER} at a time", answers["full", TOGETHER]),
    ]


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: smollm2-135m.")] = None,
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    length: Annotated[int, typer.Option(min=1, max=MAX_SPECULATIVE_TOKENS, help="Draft tokens of every step.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="From all domains.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 64,
    quick: Annotated[bool, typer.Option(help="Under two minutes: 8 prompts, 24 tokens.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "equality",
) -> None:
    """Answers alone and 8 at a time, with and without speculation; prints a table and writes a JSON file."""
    if quick:
        prompts, max_tokens = min(prompts, 8), min(max_tokens, 24)
    console = Console(width=150)
    drafting = Drafting(method, draft, length)
    settings = {"drafting": asdict(drafting), "max_tokens": max_tokens}
    record: dict[str, Any] = {"environment": environment(), "settings": settings, "models": {}}
    for each in model or ["smollm2-135m"]:
        results = compare_ways(each, drafting, mixed_prompts(each, prompts), max_tokens)
        console.print(table_of(each, results, max_tokens))
        record["models"][each] = [asdict(result) for result in results]
    write_record(name, record)


if __name__ == "__main__":
    typer.run(main)
