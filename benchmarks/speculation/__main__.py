"""Speculation against none in the same engine: ``make bench-spec``, or ``python -m benchmarks.speculation``.

Every cell (domain, concurrency) is measured with all modes, on the same prompts, before the next cell; rounds of all
cells follow each other. What counts is the ratio of two modes in the same cell and round. In this process the modes'
engines share the target's weights and take steps in turn; servers (``--http``) are loaded one after another.
With ``--acceptance``: how many draft tokens are accepted, drafts all of the same length, answers to their natural end.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from benchmarks.common.drafting import NONE, Drafting, DraftLength
from benchmarks.prompts.short import DOMAINS
from benchmarks.speculation.measure import measure
from benchmarks.speculation.plan import Plan

MODES = [NONE, "auto", "full", "static:8192"]
"""``auto`` is what is served by default."""
QUICK_MODES = [NONE, "auto"]


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: smollm2-135m.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(MODES)}; acceptance: full.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(DOMAINS)}.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Default: 1, 4, 8, 16, 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds; fewer where the time is up.")] = 3,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of an answer, in this process on average; default: 64, acceptance 128."),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers go on where the model would end them.")] = True,
    minutes: Annotated[float, typer.Option(help="The whole run ends by then, with what it has.")] = 13.0,
    fixed: Annotated[bool, typer.Option(help="Always draft --length tokens; default: the controller decides.")] = False,
    length: DraftLength = None,
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    http: Annotated[bool, typer.Option(help="Through servers and HTTP instead of in this process.")] = False,
    acceptance: Annotated[bool, typer.Option(help="Acceptance instead of speed: drafts of a fixed length.")] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each domain, for --acceptance.")] = 40,
    quick: Annotated[bool, typer.Option(help="Under two minutes: few modes, levels and tokens, one round.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the files in benchmarks/results; default: the kind, and a sole model.")
    ] = None,
) -> None:
    """Speed with and without speculation, or acceptance of draft tokens, by model, vocabulary, domain and load."""
    speed_modes = mode or (QUICK_MODES if quick else MODES)
    plan = Plan(
        kind="acceptance" if acceptance else "speed",
        models=model or ["smollm2-135m"],
        modes=mode or ["full"] if acceptance else [NONE, *(each for each in speed_modes if each != NONE)],
        domains=domain or DOMAINS,
        levels=sorted(concurrency or ([1, 8] if quick else [1, 4, 8, 16, 32])),
        rounds=1 if quick else rounds,
        prompts=min(prompts, 10) if quick else prompts,
        max_tokens=max_tokens or (24 if quick else 128 if acceptance else 64),
        ignore_eos=ignore_eos,
        seconds=100.0 if quick else 60 * minutes,
        drafting=Drafting.of(method, draft, length, adaptive=not (fixed or acceptance)),
        http=http,
    )
    what = "acceptance" if acceptance else "speculation"
    default_name = f"{what}-{plan.models[0]}" if len(plan.models) == 1 else what
    measure(plan, name or default_name, Console(width=170))


if __name__ == "__main__":
    typer.run(main)
