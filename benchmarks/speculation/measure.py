"""A plan of ``benchmarks.speculation`` carried out: speed by cell, or acceptance by wave of prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from rich.console import Console

from benchmarks.common.environment import environment
from benchmarks.common.in_process import Engine
from benchmarks.common.machine import RESULTS
from benchmarks.common.time_limit import bounded
from benchmarks.prompts.short import short_prompts
from benchmarks.speculation.plan import Plan, chosen_prompts
from benchmarks.speculation.report import report
from benchmarks.speculation.sides import HttpSides, InProcessSides, Sides, http_side
from benchmarks.speculation.summary import summaries
from engine.messages import SamplingParams

WARMUP_REQUESTS, WARMUP_TOKENS = 4, 16
ACCEPTANCE_WAVE = 10
"""Prompts of a domain that are answered before the next domain's turn."""


def speed_runs(plan: Plan, model: str, seconds: float, console: Console) -> Iterator[dict[str, Any]]:
    """One record for each mode of each cell that fits into ``seconds``, loading included."""
    started = time.monotonic()
    prompts = short_prompts(model, plan.domains)
    with ExitStack() as stack:
        configs = {mode: plan.drafting.config(model, mode) for mode in plan.modes}
        sides: Sides
        if plan.http:
            sides = HttpSides({mode: stack.enter_context(http_side(each, mode)) for mode, each in configs.items()})
        else:
            sides = InProcessSides(configs)
        sides.measure(prompts[plan.domains[0]][-WARMUP_REQUESTS:], WARMUP_REQUESTS, WARMUP_TOKENS, ignore_eos=True)
        left = seconds - (time.monotonic() - started)
        console.print(f"[dim]{model}: {len(configs)} engines ready, {left:.0f} s to measure[/dim]")
        for number, level, domain in bounded(plan.cells(), left):
            chosen = chosen_prompts(prompts[domain], level, number)
            for mode, run in sides.measure(chosen, level, plan.max_tokens, plan.ignore_eos).items():
                cell = {"model": model, "mode": mode, "domain": domain, "concurrency": level, "round": number}
                yield cell | {"tokens_per_second": run.tokens_per_second} | asdict(run)


def acceptance_runs(plan: Plan, model: str, seconds: float, console: Console) -> Iterator[dict[str, Any]]:
    """One record for each mode and each wave of a domain's prompts that fits into ``seconds``, loading included."""
    started = time.monotonic()
    by_domain = {domain: prompts[: plan.prompts] for domain, prompts in short_prompts(model, plan.domains).items()}
    engines = {mode: Engine(plan.drafting.config(model, mode)) for mode in plan.modes}
    for engine in engines.values():
        console.print(f"[dim]{model}: {engine.core.draft}[/dim]")
    sampling = SamplingParams(max_tokens=plan.max_tokens, seed=0, temperature=0.0)
    starts = range(0, max(map(len, by_domain.values())), ACCEPTANCE_WAVE)
    waves = ((domain, by_domain[domain][start : start + ACCEPTANCE_WAVE]) for start in starts for domain in by_domain)
    for domain, wave in bounded(waves, seconds - (time.monotonic() - started)):
        for mode, engine in engines.items():
            run = engine.generate(wave, sampling, ACCEPTANCE_WAVE)
            yield {
                "model": model,
                "mode": mode,
                "domain": domain,
                "prompts": len(wave),
                "tokens": run.num_tokens,
                "acceptance": asdict(run.acceptance(plan.drafting.num_tokens)),
            }


def measure(plan: Plan, name: str, console: Console) -> None:
    """Carry the plan out; the JSON file is written after every run, tables and plot at the end."""
    record: dict[str, Any] = {"plan": asdict(plan), "environment": environment(), "runs": []}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    deadline = time.monotonic() + plan.seconds
    for index, model in enumerate(plan.models):
        seconds = (deadline - time.monotonic()) / (len(plan.models) - index)
        runs = acceptance_runs if plan.kind == "acceptance" else speed_runs
        for run in runs(plan, model, seconds, console):
            record["runs"].append(run)
            path.write_text(json.dumps(record, indent=1))
    if plan.kind == "speed":
        record["cells"] = summaries(record)
        path.write_text(json.dumps(record, indent=1))
    report(record, path.with_suffix(".png"), console)
    console.print(f"{path}, {path.with_suffix('.png')}")
