"""Speculation against none in the same engine: ``make bench-spec``, or ``python -m benchmarks.speculation``.

Every cell (domain, concurrency) is measured with all modes in turn, on the same prompts, before the next cell; rounds
of all cells follow each other. What counts is the ratio of two modes in the same cell and round.
With ``--acceptance``: how many draft tokens are accepted, drafts all of the same length, answers to their natural end.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.in_process import Engine, encode_chat
from benchmarks.peers import REPOSITORY, cpu_description, git_commit
from benchmarks.prompts.build import Prompt, read_eval
from benchmarks.speculation_report import report
from benchmarks.speculation_sides import NONE, Drafting, DraftLength, InProcessSide, Side, http_side
from benchmarks.speculation_summary import summaries
from engine.config import ModelConfig
from engine.messages import SamplingParams
from engine.models.registry import resolve_model
from engine.text.tokenizer import Tokenizer
from kernels import native

RESULTS = REPOSITORY / "benchmarks" / "results"
MODES = [NONE, "full", "static:32768", "static:8192", "static:2048"]
QUICK_MODES = [NONE, "full"]
DOMAINS = ["code", "law", "medicine", "general"]
MAX_PROMPT_TOKENS = 400
"""Longer ones are left out: decoding is what is compared."""
REQUESTS_ALONE = 3
WARMUP_REQUESTS, WARMUP_TOKENS = 4, 16
ACCEPTANCE_WAVE = 10
"""Prompts of a domain that are answered before the next domain's turn."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Plan:
    """What one run measures. ``seconds`` is its bound, divided equally among the models.

    ``levels``, ``rounds``, ``http`` and ``ignore_eos`` are for kind ``speed``, ``prompts`` (of each domain) for
    ``acceptance``, whose answers always end by themselves.
    """

    kind: Literal["speed", "acceptance"]
    models: list[str]
    modes: list[str]
    domains: list[str]
    levels: list[int]
    rounds: int
    prompts: int
    max_tokens: int
    ignore_eos: bool
    seconds: float
    drafting: Drafting
    http: bool

    def cells(self) -> Iterator[tuple[int, int, str]]:
        """(round, concurrency, domain) in order of measurement: a cut run lacks the last round's largest batches."""
        return (
            (number, level, domain) for number in range(self.rounds) for level in self.levels for domain in self.domains
        )


def bounded(items: Iterable[_Item], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[_Item]:
    """The items until another one, if it took as long as the longest before it, would end later than ``seconds``."""
    start = before = clock()
    longest = 0.0
    for item in items:
        if before - start + longest > seconds:
            return
        yield item
        now = clock()
        longest, before = max(longest, now - before), now


def chosen_prompts(prompts: Sequence[Prompt], level: int, number: int) -> list[Prompt]:
    """One wave of a round (a few, one by one, at concurrency 1): every round goes on where the last one ended."""
    count = REQUESTS_ALONE if level == 1 else level
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def short_prompts(
    model: str, domains: Sequence[str], prompts: Sequence[Prompt] | None = None, limit: int | None = None
) -> dict[str, list[Prompt]]:
    """The prompts of at most ``MAX_PROMPT_TOKENS`` by domain.

    Args:
        model: whose tokens count.
        domains: wanted.
        prompts: to choose from; None: the eval prompts.
        limit: most of a domain, the first ones.
    """
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    known = [p for domain in domains for p in read_eval([domain])] if prompts is None else prompts

    def short(domain: str) -> Iterator[Prompt]:
        of_domain = (prompt for prompt in known if prompt.domain == domain)
        return (prompt for prompt in of_domain if len(encode_chat(tokenizer, prompt)) <= MAX_PROMPT_TOKENS)

    return {domain: list(islice(short(domain), limit)) for domain in domains}


def speed_runs(plan: Plan, model: str, seconds: float, console: Console) -> Iterator[dict[str, Any]]:
    """One record for each mode of each cell that fits into ``seconds``, loading included."""
    started = time.monotonic()
    prompts = short_prompts(model, plan.domains)
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for mode in plan.modes:
            config = plan.drafting.config(model, mode)
            sides[mode] = stack.enter_context(http_side(config, mode)) if plan.http else InProcessSide(config)
            warmup = prompts[plan.domains[0]][-WARMUP_REQUESTS:]
            sides[mode].measure(warmup, WARMUP_REQUESTS, WARMUP_TOKENS, ignore_eos=True)
        left = seconds - (time.monotonic() - started)
        console.print(f"[dim]{model}: {len(sides)} engines ready, {left:.0f} s to measure[/dim]")
        for number, level, domain in bounded(plan.cells(), left):
            wave = chosen_prompts(prompts[domain], level, number)
            for mode in plan.modes if number % 2 == 0 else reversed(plan.modes):
                run = sides[mode].measure(wave, level, plan.max_tokens, plan.ignore_eos)
                if plan.ignore_eos and run.tokens != len(wave) * plan.max_tokens:
                    raise RuntimeError(f"{mode} generated {run.tokens} tokens, not {len(wave) * plan.max_tokens}")
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


def environment() -> dict[str, Any]:
    """Machine and versions, for the record."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": cpu_description(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "activation_bits": native.fastest_bits() if native.unsupported_reason() is None else None,
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


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: smollm2-135m.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(MODES)}; acceptance: full.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(DOMAINS)}.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Default: 1, 4, 8, 16, 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Most rounds; fewer where the time is up.")] = 3,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens a request; default: 64, acceptance 128.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of --max-tokens, whatever the model says.")] = True,
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
