"""Draft vocabularies that follow their sessions, against those that do not: ``make bench-vocab``.

Every mode has an engine of its own, all in this process at once; they share the target's weights. Each request is
answered by all modes, which take steps in turn, before the next request; a session's snapshot goes from one request to
its next, as the server would pass it. So modes are compared on the same prompts, in the same moments.
"""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.common.drafting import NONE, Drafting, DraftLength
from benchmarks.common.environment import environment
from benchmarks.common.in_process import load_target
from benchmarks.common.machine import RESULTS
from benchmarks.common.time_limit import bounded
from benchmarks.prompts.build import Prompt, read, shuffled
from benchmarks.prompts.short import DOMAINS, short_prompts
from benchmarks.vocabulary.modes import FULL, HARD_SWITCH, Sizes, make_mode, sizes_of
from benchmarks.vocabulary.parts import PARTS, SWITCH_DOMAINS, Plan
from benchmarks.vocabulary.report import report
from benchmarks.vocabulary.sessions import Ask, SessionSide, Unit, measure_unit
from benchmarks.vocabulary.summary import summaries

MINUTES = {"modes": 4.0, "sources": 5.0, "switch": 1.75, "tenant": 1.25, "load": 3.0, "bytes": 1.5}
"""Of each part."""
DEFAULT_PARTS = [part for part in PARTS if part != "sources"]
"""11.5 minutes."""
QUICK_SECONDS = 60.0
PROMPTS = {"modes": 10, "sources": 10, "switch": 8, "tenant": 4, "load": 0, "bytes": 32}
"""Of each domain; turns, in part ``bytes``."""
TOKENS = {"modes": 64, "sources": 64, "switch": 64, "tenant": 64, "load": 64, "bytes": 48}
WARMUP_TOKENS = 16
MAX_PROMPTS = 600
"""Of a domain of another file than the eval prompts."""


def default_modes(part: str, sizes: Sizes, method: str) -> list[str]:
    """What is compared where no modes are given; ``method`` of the draft."""
    modes = {
        "modes": sizes.modes(),
        "sources": sizes.ablations(),
        "switch": [*sizes.few(), f"paper:{sizes.fr_spec}"],
        "tenant": [FULL, sizes.ours],
        "load": [NONE, *sizes.few()],
        "bytes": [FULL, sizes.ours, f"{sizes.ours}/semantic=true"],
    }[part]
    return [mode for mode in modes if mode != HARD_SWITCH or method == "eagle3"]


def prompts_of(plan: Plan) -> dict[str, list[Prompt]]:
    """By domain: the eval prompts, or those of the plan's file in an order that has nothing to do with sources."""
    domains = sorted({*plan.domains, *(SWITCH_DOMAINS if plan.part == "switch" else ())})
    if plan.prompt_file is None:
        return short_prompts(plan.model, domains)
    return short_prompts(plan.model, domains, shuffled(read(Path(plan.prompt_file))), MAX_PROMPTS)


def measure(plan: Plan, num_special: int, name: str, console: Console) -> None:
    """Carry a plan out; the JSON file is written after every request, table and plot at the end."""
    started = time.monotonic()
    record: dict[str, Any] = {"plan": asdict(plan), "environment": environment(), "runs": []}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    prompts = prompts_of(plan)
    modes = [make_mode(mode, plan.model, plan.drafting, num_special) for mode in plan.modes]
    target = load_target(modes[0].config)
    sides = [SessionSide(mode, target) for mode in modes]
    measure_unit(sides, Unit({}, [Ask(prompts[plan.domains[0]][-1], "warm-up", "warm-up")], WARMUP_TOKENS))
    left = plan.seconds - (time.monotonic() - started)
    console.print(f"[dim]{plan.part}: {len(sides)} engines ready, {left:.0f} s to measure[/dim]")
    for unit in bounded(PARTS[plan.part](plan, prompts), left):
        record["runs"] += [{"model": plan.model} | run for run in measure_unit(sides, unit)]
        path.write_text(json.dumps(record))
    record["summary"] = summaries(record)
    path.write_text(json.dumps(record))
    report(record, path.with_suffix(".png"), console)
    console.print(f"{path}, {path.with_suffix('.png')}")


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(PARTS)}; default: all but sources.")
    ] = None,
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    mode: Annotated[
        list[str] | None, typer.Option(help="Repeatable, see benchmarks/vocabulary/modes.py; default: by part.")
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(DOMAINS)}.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Of each domain (bytes: turns); default: by part.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts to use, such as train.jsonl for choices; default: the eval prompts.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Of an answer; default: by part.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Of part switch.")] = 2,
    concurrency: Annotated[list[int] | None, typer.Option(help="Of part load; default: 1, 4, 8, 16.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds of part load.")] = 5,
    ignore_eos: Annotated[
        bool, typer.Option(help="Part load: answers of --max-tokens on average, whatever the model says.")
    ] = True,
    minutes: Annotated[float | None, typer.Option(help="Of each part; it ends by then with what it has.")] = None,
    fixed: Annotated[bool, typer.Option(help="Part load: always draft --length tokens, as in the others.")] = False,
    length: DraftLength = None,
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    quick: Annotated[bool, typer.Option(help="Two prompts a domain, 24 tokens: whether it works.")] = False,
    name: Annotated[str, typer.Option(help="First part of the files' names in benchmarks/results.")] = "vocabulary",
) -> None:
    """Acceptance and speed by draft vocabulary: by domain, source, topic switch, tenant, load; and what state costs."""
    parts = part or DEFAULT_PARTS
    if unknown := set(parts) - PARTS.keys():
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}", param_hint="--part")
    sizes, console = sizes_of(model), Console(width=200)
    for each in parts:
        plan = Plan(
            part=each,
            model=model,
            modes=mode or default_modes(each, sizes, method),
            domains=domain or DOMAINS,
            prompts=(4 if each == "bytes" else 2) if quick else prompts or PROMPTS[each],
            max_tokens=24 if quick else max_tokens or TOKENS[each],
            seconds=QUICK_SECONDS if quick else 60 * (minutes or MINUTES[each]),
            drafting=Drafting.of(method, draft, length, adaptive=each == "load" and not fixed),
            sessions=1 if quick else sessions,
            levels=sorted(concurrency or ([1, 4] if quick else [1, 4, 8, 16])),
            rounds=1 if quick else rounds,
            ignore_eos=ignore_eos,
            prompt_file=None if prompt_file is None else str(prompt_file),
        )
        measure(plan, sizes.num_special, f"{name}-{each}", console)
        gc.collect()  # a part's engines are gigabytes, and hold on to themselves in circles


if __name__ == "__main__":
    typer.run(main)
