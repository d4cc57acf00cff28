"""How fast this machine reads memory, against the bytes of weights that decoding reads.

``python -m benchmarks.bandwidth`` prints the bandwidth; with ``--record benchmarks/results/serve.json`` also what
share of it each side's decoding at concurrency 1 uses.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

from benchmarks.common.machine import cpu_description
from benchmarks.serve.peers import gguf_path
from benchmarks.serve.report import runs_of

SIZES_MIB = (64, 256, 2048)
SECONDS_EACH = 1.0


def read_bandwidth(size_mib: int, threads: int) -> float:
    """Bytes a second at which ``threads`` threads sum a float32 array of ``size_mib`` MiB; the median of repeats."""
    torch.set_num_threads(threads)
    array = torch.ones(size_mib * 2**20 // 4)
    speeds: list[float] = []
    end = time.perf_counter() + SECONDS_EACH
    while time.perf_counter() < end or len(speeds) < 3:
        start = time.perf_counter()
        array.sum()
        speeds.append(array.nbytes / (time.perf_counter() - start))
    return median(speeds[1:])


def weight_bytes(side: str, model: str) -> int:
    """Bytes of weights that one decoding step of ``side`` reads: the whole file less an input table of its own.

    An embedding table that is not also the output layer is read one row a token.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_path(model)).tensors}
    read = [t for name, t in tensors.items() if name != "token_embd.weight" or "output.weight" not in tensors]
    if side == "evospec" or side.startswith("llama.cpp"):
        return sum(int(tensor.n_bytes) for tensor in read)
    return sum(2 * int(tensor.n_elements) for tensor in read)


def decode_table(record: Path, bandwidth: float) -> Table:
    """Weights read per second at concurrency 1 in a ``benchmarks.serve`` record, and the share of ``bandwidth``."""
    content = json.loads(record.read_text())
    table = Table(title="Weights read in decoding at concurrency 1 (1 / median inter-token time)")
    for header in ("model", "side", "MB of weights", "tok/s in decode", "GB/s", "share of bandwidth"):
        table.add_column(header, justify="right")
    for model in content["plan"]["models"]:
        for side in content["plan"]["sides"]:
            reports = [run["report"] for run in runs_of(content, side, model, 1).values() if run["report"]]
            if not reports:
                continue
            speed = 1 / median(report["tpot"]["p50"] for report in reports)
            size = weight_bytes(side, model)
            rate = size * speed
            table.add_row(
                model, side, f"{size / 1e6:.0f}", f"{speed:.0f}", f"{rate / 1e9:.1f}", f"{rate / bandwidth:.0%}"
            )
    return table


def main(record: Annotated[Path | None, typer.Option(help="A JSON file of benchmarks.serve.")] = None) -> None:
    """Measures and prints."""
    console = Console(width=120)
    console.print(cpu_description())
    table = Table(title="Read bandwidth, GB/s")
    for header in ("array", "1 thread", "2 threads"):
        table.add_column(header, justify="right")
    for size in SIZES_MIB:
        one, two = read_bandwidth(size, 1), read_bandwidth(size, 2)
        table.add_row(f"{size} MiB", f"{one / 1e9:.1f}", f"{two / 1e9:.1f}")
    console.print(table)
    if record is not None:
        console.print(decode_table(record, two))


if __name__ == "__main__":
    typer.run(main)
