"""Where a draft step's time goes: ``python -m benchmarks.step_share``, by rows of the draft's head and batch size.

The engine's own draft networks and heads, on real prompts; vocabularies take turns, a few steps each. ``head`` is the
projection with the choice of a token, ``layer`` the rest of ``propose`` (network, batch layout), both for each draft
token, which are drafted one by one here; ``observe`` is what a verified step costs the draft.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.drafted_batch import DraftedBatch, Target, load_draft, load_target
from benchmarks.common.environment import environment
from benchmarks.common.machine import RESULTS
from benchmarks.common.time_limit import bounded
from benchmarks.prompts.short import mixed_prompts
from engine.loader import LoadedModel
from engine.messages import SamplingParams
from engine.speculation.drafters.head import DraftHead

ROWS = (0, 32768, 8192, 2048)
"""0: all."""
CHAIN = 4
WARMUP_STEPS = 3


class TimedHead(DraftHead):
    """A head over the first ``rows`` tokens (0: all) that adds up its time."""

    def __init__(self, loaded: LoadedModel, rows: int) -> None:
        super().__init__(loaded, torch.arange(rows) if rows else None)
        self.seconds = 0.0

    def make_chain(self, *_: Any) -> None:
        """Token by token: a chain in one call has no parts to time."""

    def choose(self, *arguments: Any, **keywords: Any) -> list[int]:
        """As ``DraftHead``."""
        started = time.perf_counter()
        choices = super().choose(*arguments, **keywords)
        self.seconds += time.perf_counter() - started
        return choices


@dataclass(frozen=True)
class Split:
    """Medians over rounds, in seconds: of one draft token of the whole batch, and of observing one step."""

    rows: int
    batch: int
    head: float
    layer: float
    observe: float

    @property
    def head_share(self) -> float:
        """Of the draft step."""
        return self.head / (self.head + self.layer)


class Bench:
    """A draft with a head of some rows, and sequences to draft for."""

    def __init__(
        self, target: Target, method: str, draft: str | None, rows: int, prompts: Sequence[list[int]], steps: int
    ) -> None:
        heads: list[TimedHead] = []

        def make_head(loaded: LoadedModel) -> DraftHead:
            heads.append(TimedHead(loaded, rows))
            return heads[0]

        sampling = [SamplingParams(max_tokens=steps, seed=0, temperature=0.0, ignore_eos=True)] * len(prompts)
        loaded = load_draft(target, method, draft, make_head)
        self._head = heads[0]
        self._batch = DraftedBatch(target, loaded, prompts, sampling, CHAIN, steps)

    def measure(self, steps: int) -> tuple[float, float, float]:
        """Seconds of (head, layer) for each draft token, and of observing a step."""
        head, propose, observe = self._head.seconds, self._batch.propose_seconds, self._batch.observe_seconds
        for _ in range(steps):
            self._batch.step()
        tokens = steps * CHAIN
        head, propose = self._head.seconds - head, self._batch.propose_seconds - propose
        return head / tokens, (propose - head) / tokens, (self._batch.observe_seconds - observe) / steps


def measure(
    target: Target, method: str, draft: str | None, batch: int, rounds: int, steps: int, seconds: float
) -> list[Split]:
    """All vocabularies at one batch size, those left out that have more rows than the model."""
    prompts = [target.tokenizer.encode_messages(prompt.messages) for prompt in mixed_prompts(target.files.name, batch)]
    total = WARMUP_STEPS + rounds * steps
    rows = [count for count in ROWS if count < target.loaded.spec.vocab_size]
    benches = {count: Bench(target, method, draft, count, prompts, total) for count in rows}
    for bench in benches.values():
        bench.measure(WARMUP_STEPS)
    taken: dict[int, list[tuple[float, float, float]]] = {count: [] for count in rows}
    for _ in bounded(range(rounds), seconds):
        for count, bench in benches.items():
            taken[count].append(bench.measure(steps))
    middle = {count: [median(column) for column in zip(*parts, strict=True)] for count, parts in taken.items()}
    return [Split(count, batch, *middle[count]) for count in rows]


def table_of(model: str, description: str, splits: Sequence[Split]) -> Table:
    """A line for each vocabulary and batch size."""
    table = Table("sequences", "rows of the head", title=f"{model}, {description}: one draft token of each sequence")
    for header in ("head ms", "layer ms", "head's share", "observe ms a step"):
        table.add_column(header, justify="right")
    for s in splits:
        times = [f"{1e3 * value:.3f}" for value in (s.head, s.layer, s.observe)]
        table.add_row(str(s.batch), f"{s.rows:,}" if s.rows else "full", *times[:2], f"{s.head_share:.0%}", times[2])
        if s.rows == ROWS[-1]:
            table.add_section()
    return table


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: smollm2-135m.")] = None,
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; default: 1, 8 and 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all vocabularies in turn.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="In a row, of each vocabulary.")] = 8,
    minutes: Annotated[float, typer.Option(help="No round is begun that would end later.")] = 10.0,
    quick: Annotated[bool, typer.Option(help="Under two minutes: fewer rounds and sizes.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "step_share",
) -> None:
    """Times head and layer of a draft step, prints a table and writes a JSON file."""
    if quick:
        rounds, batch, minutes = min(rounds, 3), batch or [1, 8], min(minutes, 1.5)
    models, sizes = model or ["smollm2-135m"], batch or [1, 8, 32]
    seconds = 60 * minutes / len(models) / len(sizes)
    console = Console(width=150)
    record: dict[str, Any] = {"environment": environment(), "chain": CHAIN, "models": {}}
    for each in models:
        target = load_target(each)
        splits = [split for size in sizes for split in measure(target, method, draft, size, rounds, steps, seconds)]
        console.print(table_of(each, f"{method} {draft or 'draft'}", splits))
        record["models"][each] = [asdict(split) | {"head_share": split.head_share} for split in splits]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
