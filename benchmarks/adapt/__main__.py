"""Alignment while serving, against drafts that stay as they are: ``make bench-adapt``.

Every side is a server of its own, all up at once. Learning sides are sent a stream of requests, one after another, from
prompts that are not for evaluation; then their adapters are frozen, and held-out prompts are answered by all in turn.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console

from benchmarks.adapt.parts import LOAD_TENANT, PARTS, SWITCH_TENANT
from benchmarks.adapt.record import Plan, Prompts, Record
from benchmarks.adapt.report import report
from benchmarks.adapt.server import Server, serving
from benchmarks.adapt.sides import KINDS, SIDES, Vocabularies, make_side
from benchmarks.adapt.summary import summary
from benchmarks.common.drafting import Drafting, DraftLength
from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.prompts.build import read_eval
from benchmarks.prompts.short import short
from benchmarks.prompts.streams import STREAM_DOMAINS, read_stream, stream_and_trial
from engine.config import ModelConfig
from engine.models.registry import resolve_model
from engine.text.tokenizer import Tokenizer

MINUTES = {"gain": 25.0, "switch": 10.0, "tenants": 8.0, "memory": 4.0, "load": 5.0}
"""Of each part, loading not included."""
QUICK_MINUTES = 1.0
DOMAINS = {"switch": ["law", "medicine"], "tenants": ["law", "code"], "memory": ["law"]}
"""Of each part, where not all of ``STREAM_DOMAINS``."""
WARMUP_TOKENS = 16
_LOAD_ROUNDS_EACH = 2


def chosen_prompts(plan: Plan) -> Prompts:
    """The plan's prompts: short ones, streams without those that it measures with."""
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=plan.model)))
    everything, evaluation = read_stream(), read_eval(plan.domains)
    stream, held_out = {}, {}
    for domain in plan.domains:
        stream[domain], trial = stream_and_trial(short(everything, domain, tokenizer))
        held_out[domain] = trial if plan.trial else short(evaluation, domain, tokenizer)
    return Prompts(stream, held_out)


def measure(plan: Plan, name: str, console: Console) -> None:
    """Carry a plan out; the JSON file grows meanwhile, table and plot come at the end."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    prompts = chosen_prompts(plan)
    sides = [make_side(side, plan.vocabularies, plan.options) for side in plan.sides]
    record = Record(path, plan, environment())
    for stage in stages(plan):
        with ExitStack() as stack:
            names = [*stage.domains, SWITCH_TENANT, LOAD_TENANT]
            servers = [stack.enter_context(serving(side, plan.model, plan.drafting, names)) for side in sides]
            console.print(
                f"[dim]{plan.part}, {', '.join(stage.domains)}: {', '.join(plan.sides)} ready, "
                f"{stage.seconds:.0f} s to measure[/dim]"
            )
            uvloop.run(_carry_out(stage, prompts, servers, record))
    record.content["summary"] = summary(record.content)
    record.save()
    report(record.content, path.with_suffix(".png"), console)
    console.print(f"{path}, {path.with_suffix('.png')}")


def stages(plan: Plan) -> list[Plan]:
    """What is measured by the same servers.

    Servers with the same settings differ in speed for as long as they live, by up to 4 % (docs/measuring.md). With
    eight sequences they differ by more: what they measured at their start decides whether these draft. So there are
    others for each domain of part ``gain``, and for every two rounds of ``load``, for a mean or median over several.
    """
    if plan.part == "gain":
        return [replace(plan, domains=[domain], seconds=plan.seconds / len(plan.domains)) for domain in plan.domains]
    if plan.part == "load":
        firsts = range(0, plan.rounds, _LOAD_ROUNDS_EACH)
        each = plan.seconds / len(firsts)
        return [
            replace(plan, first_round=first, rounds=min(_LOAD_ROUNDS_EACH, plan.rounds - first), seconds=each)
            for first in firsts
        ]
    return [plan]


async def _carry_out(stage: Plan, prompts: Prompts, servers: Sequence[Server], record: Record) -> None:
    domain = stage.domains[0]
    for server in servers:
        await server.ask(prompts.stream[domain][-1], domain, WARMUP_TOKENS)
    await PARTS[stage.part](stage, prompts, servers, record)


def _plans(parts: Sequence[str], quick: bool, minutes: float | None, **options: Any) -> list[Plan]:
    return [
        Plan(
            part=part,
            seconds=60 * (QUICK_MINUTES if quick else minutes or MINUTES[part]),
            **options
            | {
                "sides": options["sides"] or SIDES[part],
                "domains": options["domains"] or DOMAINS.get(part, list(STREAM_DOMAINS)),
            },
        )
        for part in parts
    ]


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(PARTS)}; default: all.")] = None,
    side: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable, of {', '.join(KINDS)} (benchmarks/adapt/sides.py).")
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Repeatable; default: by part.")] = None,
    model: Annotated[str, typer.Option(help="The target.")] = "smollm2-135m",
    draft: Annotated[str | None, typer.Option(help="Directory of its draft; default: the one shipped.")] = None,
    static_vocabulary: Annotated[str, typer.Option(help="Of static, alignment and osd.")] = "static:4096",
    dynamic_vocabulary: Annotated[str, typer.Option(help="Of vocabulary and both.")] = "dynamic:512+512",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of engine.alignment, for all sides.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of each part; default: by part.")] = None,
    pause: Annotated[float, typer.Option(min=0, help="A stream's client waits so many times an answer's time.")] = 1.0,
    rest: Annotated[
        float,
        typer.Option(min=0, help="Seconds after a stream of part gain in which a worker may go on; beyond --minutes."),
    ] = 0.0,
    clients: Annotated[int, typer.Option(min=1, help="Of each stream, at once.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of each stream, within its time; default: all of it.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts of each domain.")] = 40,
    trial: Annotated[bool, typer.Option(help="Measure with trial prompts, to choose options by.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 128,
    length: DraftLength = None,
    adaptive: Annotated[bool, typer.Option(help="Let the controller choose lengths (part load always does).")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds of part load.")] = 6,
    concurrency: Annotated[int, typer.Option(min=1, help="Of part load.")] = 8,
    quick: Annotated[bool, typer.Option(help="A minute for each part: whether it works.")] = False,
    name: Annotated[str, typer.Option(help="First part of the files' names in benchmarks/results.")] = "adapt",
) -> None:
    """Acceptance, speed and memory of drafts that learn while they serve: by domain, topic, tenant and load."""
    parts = part or list(PARTS)
    if unknown := set(parts) - PARTS.keys():
        raise typer.BadParameter(f"no such part: {', '.join(sorted(unknown))}", param_hint="--part")
    options = {
        "model": model,
        "sides": side,
        "vocabularies": Vocabularies(static_vocabulary, dynamic_vocabulary),
        "options": option or [],
        "domains": domain,
        "pause": pause,
        "rest": rest,
        "clients": clients,
        "tokens": tokens,
        "prompts": min(prompts, 4) if quick else prompts,
        "trial": trial,
        "max_tokens": min(max_tokens, 64) if quick else max_tokens,
        "rounds": 1 if quick else rounds,
        "concurrency": concurrency,
    }
    for each in parts:
        drafting = Drafting.of("eagle3", draft, length, adaptive=adaptive or each == "load")
        (plan,) = _plans([each], quick, minutes, drafting=drafting, **options)
        measure(plan, f"{name}-{each}", Console(width=180))
        gc.collect()


if __name__ == "__main__":
    typer.run(main)
