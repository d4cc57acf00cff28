"""What a tenant's past is worth: ``python -m benchmarks.vocabulary.tenants``.

The first tokens of the same prompts, asked by a new tenant, by one who comes back, and in a session that goes on. The
latter two are different tenants with the same past, as many other prompts, so that none has met a prompt before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.acceptance import Run, length
from benchmarks.common.in_process import Generation
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.short import DOMAINS, short_prompts
from benchmarks.vocabulary.modes import FULL, sizes_of
from benchmarks.vocabulary.sessions import Ask, Labels, answers, counts, make_sides, recorded

NEW_TENANT, RETURNING_TENANT, RETURNING_SESSION, LEARNING = "new tenant", "returning tenant", "session", "learning"
MAX_TOKENS = 64


def asks(prompts: Mapping[str, Sequence[Prompt]], number: int) -> Iterator[tuple[Labels, Ask]]:
    """``number`` prompts of each domain to learn from, and as many others."""
    for place, domain in product(range(number), prompts):
        for kind in (RETURNING_TENANT, RETURNING_SESSION):
            ask = Ask(prompts[domain][place].messages, f"{kind}-{domain}-past", f"{kind}-{domain}", domain)
            yield {"domain": domain, "kind": LEARNING}, ask
    for place, domain in product(range(number, 2 * number), prompts):
        messages, name = prompts[domain][place].messages, f"new-{domain}-{place}"
        past = f"{RETURNING_SESSION}-{domain}"
        of_kinds = {
            NEW_TENANT: Ask(messages, name, name, domain),
            RETURNING_TENANT: Ask(messages, f"{RETURNING_TENANT}-{name}", f"{RETURNING_TENANT}-{domain}", domain),
            RETURNING_SESSION: Ask(messages, f"{past}-past", past, domain),
        }
        for kind, ask in of_kinds.items():
            yield {"domain": domain, "kind": kind}, ask


def vocabulary_counts(run: Generation) -> dict[str, Any]:
    """Tokens verified, those of them that could have been drafted, and what supplied the accepted ones of the tail."""
    [found] = run.vocabularies
    if found is None:
        return {"verified": 0, "covered": 0, "hits": {}}
    return {"verified": found.verified_tokens, "covered": found.covered_tokens, "hits": found.hits}


def table(runs: Sequence[Run], title: str) -> Table:
    """A line for each mode and kind of tenant."""
    lines = Table("mode", "tenant", "requests", "coverage", "acceptance length", "hits by source", title=title)
    for mode, kind in dict.fromkeys((run["mode"], run["kind"]) for run in runs if run["kind"] != LEARNING):
        ours = [run for run in runs if (run["mode"], run["kind"]) == (mode, kind)]
        verified, covered = (sum(run[key] for run in ours) for key in ("verified", "covered"))
        hits = sum((Counter(run["hits"]) for run in ours), Counter[str]())
        coverage = f"{covered / verified:.1%}" if verified else "–"
        by_source = ", ".join(f"{source} {number}" for source, number in hits.items()) or "–"
        lines.add_row(mode, kind, str(len(ours)), coverage, f"{length(ours):.2f}", by_source)
    return lines


def main(
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    mode: Annotated[list[str] | None, typer.Option(help="Repeatable, see modes.py.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=20, help="Of each domain, to learn from and to measure.")] = 4,
    name: Annotated[str, typer.Option(help="Of the record.")] = "vocabulary-tenants",
) -> None:
    """Coverage and acceptance of the first tokens by kind of tenant."""
    sides = make_sides(mode or [FULL, sizes_of(model).ours], model)
    requests = asks(short_prompts(model, DOMAINS), prompts)
    done = (labels | counts(run) | vocabulary_counts(run) for labels, run in answers(sides, requests, MAX_TOKENS))
    runs = recorded(name, {"model": model, "prompts": prompts, "max_tokens": MAX_TOKENS}, done)
    Console(width=160).print(table(runs, f"{model}, greedy, the first {MAX_TOKENS} tokens"))


if __name__ == "__main__":
    typer.run(main)
