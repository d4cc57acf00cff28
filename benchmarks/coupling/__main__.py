"""How often draft tokens are accepted: coupled noise (ours) against rejection sampling and a greedy draft.

``python -m benchmarks.coupling``. The target samples answers to the eval prompts; at every position the draft makes a
chain of tokens, and the target scores them. All rules (``benchmarks.coupling.rules``) are judged at the same positions
by the same two distributions; the draft's is cut to the candidates that the engine looks at.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.common.runs import ALL
from benchmarks.common.time_limit import bounded
from benchmarks.coupling.measure import CHAIN, load_setup, measure
from benchmarks.coupling.rules import RULES
from benchmarks.coupling.summary import Sample, Summary, summarise
from benchmarks.prompts.short import DOMAINS, short_prompts
from engine.spec.draft_head import CANDIDATES

WAVE = 8
"""Prompts of one domain that are answered together."""


def table_of(title: str, summaries: Sequence[Summary]) -> Table:
    """A line a summary."""
    table = Table("temperature", "domain", "rule", title=title)
    for header in ("positions", *(f"place {place + 1}" for place in range(CHAIN)), "acceptance length"):
        table.add_column(header, justify="right")
    for s in summaries:
        numbers = [f"{value:.3f}" for value in s.reached]
        table.add_row(
            f"{s.temperature}", s.domain, s.rule, str(s.positions), *numbers, f"{s.length:.3f} ± {s.error:.3f}"
        )
        if s.rule == RULES[-1]:
            table.add_section()
    return table


def main(
    model: Annotated[str, typer.Option(help="Registry name or path.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Default: 0.7 and 1.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(DOMAINS)}.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each domain.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Positions of each answer.")] = 48,
    candidates: Annotated[int, typer.Option(help="Tokens that a draft is chosen among; 0: all.")] = CANDIDATES,
    minutes: Annotated[float, typer.Option(help="No prompts are begun that would end later.")] = 13.0,
    quick: Annotated[bool, typer.Option(help="Under two minutes: two prompts a domain, 12 positions.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "coupling",
) -> None:
    """Replays the three rules on the same positions, prints a table and writes a JSON file."""
    started, console = time.monotonic(), Console(width=150)
    if quick:
        prompts, max_tokens, minutes = min(prompts, 2), min(max_tokens, 12), min(minutes, 1.7)
    domains, temperatures = domain or DOMAINS, temperature or [0.7, 1.0]
    setup = load_setup(model, method, draft, candidates)
    console.print(f"[dim]{model}: {setup.draft.description}[/dim]")
    by_domain = short_prompts(model, domains)
    numbered = list(enumerate(prompt for each in domains for prompt in by_domain[each][:prompts]))
    starts = range(0, len(numbered), WAVE)
    waves = [(heat, numbered[start : start + WAVE]) for start in starts for heat in temperatures]
    samples: list[Sample] = []
    for heat, wave in bounded(waves, 60 * minutes - (time.monotonic() - started)):
        samples += measure(setup, wave, heat, max_tokens)
    wanted = [(heat, field, rule) for heat in temperatures for field in [*domains, ALL] for rule in RULES]
    summaries = [s for s in (summarise(samples, *which) for which in wanted) if s is not None]
    console.print(table_of(f"{model}, {setup.draft.description}: share of drafts accepted up to each place", summaries))
    record = {
        "environment": environment(),
        "settings": {
            "model": model,
            "draft": setup.draft.description,
            "candidates": candidates,
            "prompts": prompts,
            "max_tokens": max_tokens,
        },
        "summaries": [asdict(summary) for summary in summaries],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
