"""How many draft tokens are accepted, by set of prompts and by draft vocabulary: ``make bench-acceptance``.

Drafts have always the same length and answers end by themselves, so that what is compared is how good drafts are, and
not how fast. Every mode has an engine of its own, all share the target's weights. A set's prompts are the requests of
one session, one after the other: that is what a vocabulary follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.common.acceptance import table
from benchmarks.common.drafting import FIXED_LENGTH, Drafting
from benchmarks.prompts.build import Messages
from benchmarks.prompts.sets import evaluation_files, read_sets
from benchmarks.vocabulary.modes import FR_SPEC, FULL, NANOSPEC, PAPER, sizes_of
from benchmarks.vocabulary.sessions import Ask, Labels, answers, counts, make_sides, recorded


def default_modes(model: str, method: str) -> list[str]:
    """All tokens, others' methods, and what is served by default, with and without its prior."""
    sizes = sizes_of(model, method)
    others = [f"{FR_SPEC}{sizes.fr_spec}", NANOSPEC, f"{PAPER}{sizes.fr_spec}"]
    return [FULL, *others, sizes.ours, f"{sizes.ours}/prior=off"]


def asks(sets: Mapping[str, Sequence[Messages]]) -> Iterator[tuple[Labels, Ask]]:
    """A session for each set; its tenant has no other."""
    for name, prompts in sets.items():
        for number, messages in enumerate(prompts):
            yield {"set": name, "number": number}, Ask(messages, name, name, name)


def main(
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Repeatable, the first is what others are compared with; see modes.py.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--set", help="Of prompts, repeatable; default: all.")] = None,
    count: Annotated[int, typer.Option(min=2, help="Prompts of a set.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of an answer, at most.")] = 96,
    name: Annotated[str | None, typer.Option(help="Of the record; default: acceptance-MODEL.")] = None,
) -> None:
    """Acceptance lengths of the first mode in tokens, of others in percent of them."""
    sets = read_sets(evaluation_files(), count)
    if unknown := set(only or ()) - sets.keys():
        raise typer.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(sets)}", param_hint="--set")
    modes = list(dict.fromkeys(mode or default_modes(model, method)))
    chosen = {one: prompts for one, prompts in sets.items() if one in (only or sets)}
    sides = make_sides(modes, model, Drafting(method, draft))
    plan = {"model": model, "method": method, "draft": draft, "count": count, "max_tokens": max_tokens}
    done = (labels | counts(run) for labels, run in answers(sides, asks(chosen), max_tokens))
    runs = recorded(name or f"acceptance-{model}", plan, done)
    Console(width=220).print(table(runs, f"{model}, greedy, {FIXED_LENGTH} draft tokens a step"))


if __name__ == "__main__":
    typer.run(main)
