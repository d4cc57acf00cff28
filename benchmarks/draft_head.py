"""What a draft's choice of candidates costs: ``python -m benchmarks.draft_head``, at most a minute.

Random heads in the shapes and the storage format of the models' own; no model is loaded. Printed: microseconds of one
call of ``kernels.draft_head`` by rows of the core, slots of a tail and sequences; the best of the rounds in brackets.
Every round goes through all cases, so that another process that takes the cores for a while slows none of them alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import gguf.quants
import numpy as np
import torch
import typer
from gguf import GGMLQuantizationType
from rich.console import Console
from rich.table import Table

from engine.machine import available_cores
from kernels.draft_head import draft_head_topk
from kernels.head_rows import Core, TailSlabs
from kernels.native import MatrixPart, PackedMatrix, Team, linear

CANDIDATES = 64
TAIL_SLOTS = (0, 256, 1024)
BATCHES = (1, 4, 8, 16)
NUM_SLABS = 32
"""More than a batch: each call takes other slabs, as the steps of a server with other work in between find them."""
CALLS_AT_ONCE = 3


@dataclass(frozen=True)
class Head:
    """Shape of a model's head; the files of both store it as Q8_0."""

    name: str
    vocab_size: int
    hidden: int


HEADS = (Head("smollm2-135m", 49_152, 576), Head("qwen2.5-coder-0.5b", 151_936, 896))
STORAGE = GGMLQuantizationType.Q8_0
CORE_ROWS = (None, 32_768, 8_192, 2_048)
"""None: the whole vocabulary."""


@dataclass
class Result:
    """Seconds of a call, one entry a round."""

    head: str
    core_rows: int
    tail_slots: int
    batch: int
    seconds: list[float]


class Case:
    """One core, with tails of one size."""

    def __init__(self, head: Head, core: Core, tails: TailSlabs | None, team: Team) -> None:
        self._head, self._core, self._tails, self._team = head, core, tails, team

    def measure(self, batch: int) -> float:
        """Seconds of one call, the mean of a few; the first is not counted, since other cases came before."""
        hidden = torch.randn(batch, self._head.hidden).bfloat16()
        slabs = [torch.randperm(NUM_SLABS, dtype=torch.int32)[:batch] for _ in range(1 + CALLS_AT_ONCE)]
        start = 0.0
        for call, of_call in enumerate(slabs):
            if call == 1:
                start = time.perf_counter()
            draft_head_topk(hidden, self._core, CANDIDATES, self._tails, of_call, self._team)
        return (time.perf_counter() - start) / CALLS_AT_ONCE


def make_cases(head: Head, team: Team) -> Iterator[tuple[int, int, Case]]:
    """(core rows, tail slots, case) of one model."""
    values = np.random.default_rng(0).standard_normal((2_048, head.hidden), np.float32)
    blocks = gguf.quants.quantize(values, STORAGE)
    tails = {slots: _full_tails(head, slots) if slots else None for slots in TAIL_SLOTS}
    for rows in (count or head.vocab_size for count in CORE_ROWS):
        repeated = np.resize(blocks, (rows, blocks.shape[1]))
        packed = PackedMatrix(rows, head.hidden, [MatrixPart(np.arange(rows), int(STORAGE), blocks=repeated)])
        core = _core(packed, team)
        for slots in TAIL_SLOTS:
            yield rows, slots, Case(head, core, tails[slots], team)


def _core(packed: PackedMatrix, team: Team) -> Core:
    # The product writes to memory that is there, as a model's own does.
    logits = torch.empty(max(BATCHES), packed.n)
    return Core(lambda hidden: linear(team, packed, hidden, logits[: len(hidden)]))


def _full_tails(head: Head, slots: int) -> TailSlabs:
    def head_rows(token_ids: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(token_ids), head.hidden)

    tails = TailSlabs(head_rows, NUM_SLABS, slots, head.hidden, torch.bfloat16, torch.device("cpu"))
    for slab in range(NUM_SLABS):
        tails.write(slab, range(slots), range(slots))
    return tails


def measure(seconds: float, threads: int) -> list[Result]:
    """Rounds through all cases of all heads until the time is over, two at least."""
    team, results = Team(threads), []
    for head in HEADS:
        cases = [
            (case, Result(head.name, rows, slots, batch, []))
            for rows, slots, case in make_cases(head, team)
            for batch in BATCHES
        ]
        end = time.monotonic() + seconds / len(HEADS)
        while time.monotonic() < end or len(cases[-1][1].seconds) < 2:
            for case, result in cases:
                result.seconds.append(case.measure(result.batch))
        results += [result for _, result in cases]
    return results


def make_table(head: Head, results: list[Result]) -> Table:
    """One line a core and tail, one column a batch."""
    table = Table("core", "tail", *(f"batch {batch}" for batch in BATCHES), title=f"{head.name}: µs of a call (best)")
    cells = {(r.core_rows, r.tail_slots, r.batch): r.seconds for r in results if r.head == head.name}
    for rows in dict.fromkeys(key[0] for key in cells):
        for slots in TAIL_SLOTS:
            line = [cells[rows, slots, batch] for batch in BATCHES]
            texts = [f"{1e6 * median(seconds):,.0f} ({1e6 * min(seconds):,.0f})" for seconds in line]
            table.add_row(f"{rows:,}", str(slots), *texts)
        table.add_section()
    return table


def main(
    seconds: Annotated[float, typer.Option(help="Time to measure.")] = 30.0,
    threads: Annotated[int, typer.Option(help="Of the kernels; 0: one a core.")] = 0,
    record: Annotated[Path | None, typer.Option(help="Also write a JSON file.")] = None,
) -> None:
    """Measures and prints a table for each model."""
    torch.set_num_threads(1)
    results = measure(seconds, threads or available_cores())
    console = Console(width=120)
    for head in HEADS:
        console.print(make_table(head, results))
    if record is not None:
        record.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
