"""What choosing tokens costs: ``python -m benchmarks.sampling`` for each set of parameters and number of rows.

Real decode steps of a model through the engine: without speculation, so that rows are sequences, or (``--drafts``) as
it is served, where each sequence has as many rows more as it has drafts. Printed: median milliseconds of sampling in a
step, and the share of the whole step in brackets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.in_process import Engine, Turn
from benchmarks.common.machine import write_record
from benchmarks.prompts.build import read_eval
from evospec.engine.config import EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from evospec.engine.messages import Grammar, SamplingParams, StepTimings

PROMPT_TOKENS = 48
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"temperature": 0.7, "top_k": 50},
    "top_p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "top_p 0.95, temperature 1.5": {"temperature": 1.5, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "top_k, top_p, min_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "greedy, penalties": {"temperature": 0.0, **PENALTIES},
    "top_p 0.95, penalties": {"temperature": 0.7, "top_p": 0.95, **PENALTIES},
    "temperature 0.7, 5 logprobs": {"temperature": 0.7, "logprobs": 5},
    "temperature 0.7, JSON": {"temperature": 0.7, "grammar": Grammar(kind="json_object")},
}


def decode_steps(
    engine: Engine, prompts: Sequence[list[int]], parameters: dict[str, Any], sequences: int, num_steps: int
) -> list[StepTimings]:
    """The timings of steps in which all ``sequences`` decode."""
    params = {"ignore_eos": True, "max_tokens": num_steps + 8, **parameters}
    for seed, prompt in enumerate(islice(cycle(prompts), sequences)):
        engine.start(Turn(prompt), SamplingParams(seed=seed, **params))
    steps: list[StepTimings] = []
    started: set[str] = set()
    finished = 0
    while finished < sequences:
        all_decode = len(started) == sequences and not finished
        outputs, timings = engine.step()
        if timings is None:
            time.sleep(engine.core.patience())
            continue
        if all_decode:
            steps.append(timings)
        started.update(output.request_id for output in outputs)
        finished += sum(output.finish_reason is not None for output in outputs)
    return steps


def main(
    model: Annotated[str, typer.Option(help="Registry name or path.")] = "qwen2.5-coder-0.5b",
    sequences: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 1, 4, 8 and 32.")] = None,
    drafts: Annotated[bool, typer.Option(help="As served: with drafts where they pay.")] = False,
    steps: Annotated[int, typer.Option(help="Decode steps of each measurement; fewer with drafts.")] = 24,
    only: Annotated[str, typer.Option(help="Only parameter sets whose name contains this.")] = "",
    name: Annotated[
        str | None, typer.Option(help="Of the file in benchmarks/results; default: sampling(-drafts).")
    ] = None,
) -> None:
    """Measures, prints a table and writes a JSON file."""
    counts = sequences or [1, 4, 8, 32]
    settings = {"model": model, "drafts": drafts, "steps": steps}
    record: dict[str, Any] = {"environment": environment(), "settings": settings, "results": {}}
    config = EngineConfig(
        model=ModelConfig(name=model, max_model_len=1024),
        scheduler=SchedulerConfig(max_num_seqs=max(counts)),
        speculation=SpeculationConfig() if drafts else SpeculationConfig(method="none"),
    )
    engine = Engine(config)
    texts = (engine.tokenizer.encode(prompt.messages[-1]["content"]) for prompt in read_eval())
    prompts = [tokens[:PROMPT_TOKENS] for tokens in texts if len(tokens) >= PROMPT_TOKENS]
    decode_steps(engine, prompts, {}, max(counts), 4)  # warm up
    console = Console(width=150)
    title = f"{model}, {'drafts where they pay' if drafts else 'no drafts'}: sampling, ms (share of a step)"
    table = Table("parameters", *(f"{count} at once" for count in counts), title=title)
    for kind, parameters in PARAMETERS.items():
        if only not in kind:
            continue
        cells: dict[int, dict[str, float]] = {}
        for count in counts:
            timings = decode_steps(engine, prompts, parameters, count, steps)
            sample = median(t.sample for t in timings)
            whole = median(t.schedule + t.draft + t.forward + t.sample + t.commit for t in timings)
            rows = sum(t.num_tokens for t in timings) / len(timings)
            cells[count] = {"sample_seconds": sample, "step_seconds": whole, "rows": rows, "steps": len(timings)}
        record["results"][kind] = cells
        table.add_row(kind, *(_cell(cells[count]) for count in counts))
    console.print(table)
    write_record(name or ("sampling-drafts" if drafts else "sampling"), record)


def _cell(result: dict[str, float]) -> str:
    sample, whole = result["sample_seconds"], result["step_seconds"]
    return f"{1e3 * sample:.2f} ({sample / whole:.1%} of {1e3 * whole:.1f})"


if __name__ == "__main__":
    typer.run(main)
