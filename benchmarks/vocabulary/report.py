"""Tables and plots of ``benchmarks.vocabulary`` records; ``python -m benchmarks.vocabulary.report FILE`` again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib as mpl
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.drafting import NONE
from benchmarks.common.runs import ALL, Record, runs_of
from benchmarks.vocabulary.modes import FULL
from benchmarks.vocabulary.summary import SETTLED_SHARE, references, summaries, switch_lengths

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = [
    *("#6b7280", "#c2410c", "#1d4ed8", "#0f766e", "#a16207", "#7e22ce", "#be185d"),
    *("#15803d", "#0e7490", "#4d7c0f", "#b91c1c", "#4338ca", "#78716c", "#f59e0b", "#334155"),
]


def table(record: Record) -> Table:
    """A line for each mode (and topic, kind of tenant, or concurrency)."""
    plan = record["plan"]
    tokens = f"{plan['max_tokens']} tokens a request"
    if plan["part"] == "load":
        tokens = f"{'about' if plan.get('ignore_eos', True) else 'up to'} {tokens}"
    title = f"{plan['part']}: {plan['model']}, greedy, {tokens}"
    match plan["part"]:
        case "switch":
            headers, lines = _switch_lines(record)
        case "tenant":
            headers, lines = _tenant_lines(record)
        case "load":
            headers, lines = _load_lines(record)
        case "bytes":
            headers, lines = _bytes_lines(record)
        case _:
            headers, lines = _mode_lines(record)
    result = Table(title=title)
    for header in headers:
        result.add_column(
            header, justify="left" if header in ("mode", "topic", "tenant", "hits by source") else "right"
        )
    for line in lines:
        result.add_row(*line)
    return result


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


_Lines = tuple[list[str], list[list[str]]]


def _mode_lines(record: Record) -> _Lines:
    domains, others = record["plan"]["domains"], references(record["plan"]["modes"])
    headers = ["mode", *domains, "% of full (c, l, m)", "coverage", "tok/s", *(f"/ {other}" for other in others)]
    lines = [
        [
            row["mode"],
            *(_number(row["lengths"][domain]) for domain in domains),
            _number(row["share_of_full"], ".1%"),
            _number(row["coverage"], ".1%"),
            _number(row["tokens_per_second"], ".1f"),
            *(_spread(row["to"][other]) for other in others),
            _number(median(row["decode_to"][FULL]) if row["decode_to"].get(FULL) else None),
            _number(row["retrieval_ms"], ".3f"),
            _number(row["noise"], ".0f"),
        ]
        for row in record["summary"]
    ]
    return [*headers, "decode only / full", "learning ms a step", "other load %"], lines


def _switch_lines(record: Record) -> _Lines:
    headers = ["mode", "topic", "length", "first / full", "steady / full", f"requests to {SETTLED_SHARE:.0%} of steady"]
    lines = [
        [
            row["mode"],
            row["domain"],
            _number(row["length"]),
            _number(row["first"]),
            _number(row["steady"]),
            _number(row["settled_after"], "d"),
        ]
        for row in record["summary"]
    ]
    return headers, lines


def _tenant_lines(record: Record) -> _Lines:
    headers = ["mode", "tenant", "requests", "coverage", "length", "/ full", "hits by source"]
    lines = [
        [
            row["mode"],
            row["kind"],
            str(row["requests"]),
            _number(row["coverage"], ".1%"),
            _number(row["length"]),
            _number(row["share_of_full"]),
            ", ".join(f"{source} {hits}" for source, hits in row["hits"].items()) or "–",
        ]
        for row in record["summary"]
    ]
    return headers, lines


def _load_lines(record: Record) -> _Lines:
    modes = record["plan"]["modes"]
    headers = ["concurrency", "mode", "tok/s", *(f"/ {mode}" for mode in modes), "length", "coverage", "other load %"]
    lines = [
        [
            str(row["concurrency"]),
            row["mode"],
            _number(row["tokens_per_second"], ".1f"),
            *(_spread(row["to"].get(mode, [])) for mode in modes),
            _number(row["length"]),
            _number(row["coverage"], ".1%"),
            _number(row["noise"], ".0f"),
        ]
        for row in record["summary"]
    ]
    return headers, lines


def _bytes_lines(record: Record) -> _Lines:
    headers = ["mode", "turns", "bytes after 1", "at the end", "most", "length, early half", "late half"]
    lines = [
        [
            row["mode"],
            str(row["turns"]),
            *(_number(row[key], ",d") for key in ("first_bytes", "last_bytes", "most_bytes")),
            _number(row["early_length"]),
            _number(row["late_length"]),
            " ".join(f"{value:.2f}" for value in row["step_ms"]),
            " ".join(f"{value:.3f}" for value in row["retrieval_ms"]),
        ]
        for row in record["summary"]
    ]
    return [*headers, "step ms p50 p90 p99", "learning ms p50 p90 p99"], lines


def plot(record: Record, path: Path) -> None:
    """Draw the part's picture."""
    draw = {"switch": _plot_switch, "tenant": _plot_tenant, "load": _plot_load, "bytes": _plot_bytes}
    figure, panels = plt.subplots(1, 2, figsize=(14, 5))
    draw.get(record["plan"]["part"], _plot_modes)(record, *panels)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{record['plan']['model']}, {record['environment']['cpu']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_modes(record: Record, left: Axes, right: Axes) -> None:
    domains = record["plan"]["domains"]
    rows = [row for row in record["summary"] if row["mode"] != NONE]
    _bars(left, domains, {row["mode"]: [row["lengths"][domain] for domain in domains] for row in rows})
    left.set(ylabel="acceptance length", ylim=(1, None))
    speeds = [(row["mode"], row["to"][FULL]) for row in record["summary"] if row["to"].get(FULL)]
    for place, (mode, values) in enumerate(speeds):
        middle = median(values)
        error = [[middle - min(values)], [max(values) - middle]]
        right.errorbar([middle], [place], xerr=error, color=COLOURS[place % len(COLOURS)], marker="o", label=mode)
    right.axvline(1.0, color="#b91c1c", linewidth=0.8, linestyle="--")
    right.set_yticks(range(len(speeds)), [mode for mode, _ in speeds], fontsize=7)
    right.set(xlabel="tok/s / tok/s with the full head")


def _bars(panel: Axes, ticks: Sequence[str], values: dict[str, list[Any]]) -> None:
    width = 0.8 / max(1, len(values))
    for index, (name, heights) in enumerate(values.items()):
        places = [tick + (index - (len(values) - 1) / 2) * width for tick in range(len(ticks))]
        panel.bar(places, [height or 0.0 for height in heights], width, label=name, color=COLOURS[index % len(COLOURS)])
    panel.set_xticks(range(len(ticks)), ticks)


def _plot_switch(record: Record, left: Axes, right: Axes) -> None:
    full = switch_lengths(record, FULL)
    for index, mode in enumerate(record["plan"]["modes"]):
        lengths = switch_lengths(record, mode)
        colour = COLOURS[index % len(COLOURS)]
        left.plot(list(lengths), list(lengths.values()), label=mode, color=colour, marker=".")
        places = sorted(lengths.keys() & full.keys())
        right.plot(places, [lengths[p] / full[p] for p in places], label=mode, color=colour, marker=".")
    first = {run["domain"]: run["place"] for run in reversed(record["runs"])}
    for panel in (left, right):
        for domain, place in first.items():
            panel.axvline(place - 0.5, color="#9ca3af", linewidth=0.8)
            panel.text(place - 0.4, 0.98, domain, transform=panel.get_xaxis_transform(), va="top", fontsize=8)
        panel.set(xlabel="request of the session")
    left.set(ylabel="acceptance length")
    right.set(ylabel="acceptance length / full head's on the same prompts")


def _plot_tenant(record: Record, left: Axes, right: Axes) -> None:
    rows = record["summary"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for panel, key, label in ((left, "coverage", "coverage"), (right, "length", "acceptance length")):
        values: dict[str, list[Any]] = {}
        for row in rows:
            values.setdefault(row["mode"], []).append(row[key])
        _bars(panel, kinds, {mode: heights for mode, heights in values.items() if any(heights)})
        panel.set(ylabel=f"{label}, first tokens of a request")
    left.set(ylim=(0.5, 1))
    right.set(ylim=(1, None))


def _plot_load(record: Record, left: Axes, right: Axes) -> None:
    levels, modes = record["plan"]["levels"], record["plan"]["modes"]
    for index, mode in enumerate(modes):
        rows = [row for row in record["summary"] if row["mode"] == mode and row["rounds"]]
        colour = COLOURS[index % len(COLOURS)]
        ticks = [levels.index(row["concurrency"]) for row in rows]
        left.plot(ticks, [row["tokens_per_second"] for row in rows], label=mode, color=colour, marker="o")
        ratios = [row["to"].get(FULL, [1.0]) or [1.0] for row in rows]
        right.plot(ticks, [median(values) for values in ratios], label=mode, color=colour, marker="o")
    for panel, label in ((left, "tok/s"), (right, "tok/s / full head")):
        panel.set_xticks(range(len(levels)), [str(level) for level in levels])
        panel.set(xlabel="concurrent sessions, domains mixed", ylabel=label)


def _plot_bytes(record: Record, left: Axes, right: Axes) -> None:
    for index, mode in enumerate(record["plan"]["modes"]):
        runs = runs_of(record, record["plan"]["model"], mode, ALL)
        colour = COLOURS[index % len(COLOURS)]
        sizes = [size / 1024 for run in runs for size in run["snapshot_bytes"]]
        if sizes:
            left.plot(range(1, len(sizes) + 1), sizes, label=mode, color=colour, marker=".")
        steps = sorted(value for run in runs for value in run["step_ms"])
        right.plot(steps, [(place + 1) / len(steps) for place in range(len(steps))], label=mode, color=colour)
    left.set(xlabel="turn of the conversation", ylabel="snapshot, KiB")
    right.set(xlabel="step, ms", ylabel="share of steps", xscale="log")


def report(record: Record, path: Path, console: Console) -> None:
    """Print the table and draw ``path``."""
    console.print(table(record))
    plot(record, path)


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.vocabulary.")]) -> None:
    """Prints the table of a record and draws its plot again."""
    content = json.loads(record.read_text())
    content["summary"] = summaries(content)
    report(content, record.with_suffix(".png"), Console(width=200))


if __name__ == "__main__":
    typer.run(main)
