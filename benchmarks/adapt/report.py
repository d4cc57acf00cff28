"""Tables and plots of ``benchmarks.adapt`` records; ``python -m benchmarks.adapt.report FILE`` prints and draws one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib as mpl
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.adapt.record import HELD_OUT, RETURN, STREAM
from benchmarks.adapt.summary import Row, length, of, smoothed, summary

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#6b7280", "#1d4ed8", "#c2410c", "#0f766e", "#a16207", "#7e22ce", "#be185d")
_Columns = Sequence[tuple[str, str, str]]
"""Header, key of the row, format."""
_COUNTS: _Columns = (("updates", "updates", "d"), ("published", "published", "d"), ("refused", "refused", "d"))
COLUMNS: dict[str, _Columns] = {
    "gain": (
        ("domain", "domain", "s"),
        ("prompts", "prompts", "d"),
        ("length", "length", ".3f"),
        ("/ first", "to_base", ".3f"),
        ("±", "to_base_error", ".3f"),
        ("tok/s", "tokens_per_second", ".1f"),
        ("/ first", "speed_to_base", ".3f"),
        ("decoding / first", "decode_to_base", ".3f"),
        ("first token ms", "first_seconds", "ms"),
        ("step ms", "step_seconds", "ms"),
        ("stream tokens", "stream_tokens", "d"),
        ("minutes", "stream_minutes", ".1f"),
        *_COUNTS,
        ("taken back", "rolled_back", "d"),
    ),
    "switch": (
        ("first topic", "first", ".3f"),
        ("gained", "gained", "+.1%"),
        ("after the second", "returned", ".3f"),
        ("of the gain lost", "lost", ".1%"),
        ("± (ratio)", "error", ".3f"),
        ("second topic", "second", ".3f"),
        ("stream tokens", "stream_tokens", "d"),
        *_COUNTS,
    ),
    "memory": (
        ("engine MB", "engine", ".0f"),
        ("over first", "engine_over_base", ".0f"),
        ("worker MB", "worker", ".0f"),
        ("of it when ready", "worker_ready", ".0f"),
        ("beyond", "worker_net", ".0f"),
        ("sum", "sum", ".0f"),
        *_COUNTS,
    ),
    "load": (
        ("rounds", "rounds", "d"),
        ("tok/s", "tokens_per_second", ".1f"),
        ("/ first", "tokens_per_second_to_base", "spread"),
        ("ITL p50 ms", "itl_p50", "ms"),
        ("p99", "itl_p99", "ms"),
        ("p99 / first", "itl_p99_to_base", "spread"),
        ("worker, cores", "worker_cores", ".3f"),
        ("updates", "updates", "d"),
        ("other load %", "noise", ".0f"),
    ),
}


def table(record: Row) -> Table:
    """A line for each side (and domain)."""
    plan = record["plan"]
    result = Table(title=f"{plan['part']}: {plan['model']}, greedy, at most {plan['max_tokens']} tokens an answer")
    columns = [("side", "side", "s"), *COLUMNS.get(plan["part"], COLUMNS["gain"])]
    for header, _, form in columns:
        result.add_column(header, justify="left" if form == "s" else "right")
    for row in record["summary"]:
        result.add_row(*(_cell(row.get(key), form) for _, key, form in columns))
        if row.get("domain") == "mean":
            result.add_section()
    return result


def _cell(value: Any, form: str) -> str:
    if value is None or value == []:
        return "–"
    if form == "spread":
        return f"{median(value):.3f} ({min(value):.3f}–{max(value):.3f})"
    if form == "ms":
        return f"{1e3 * value:.1f}"
    return format(value, form)


def plot(record: Row, path: Path) -> None:
    """Draw the part's picture."""
    part = record["plan"]["part"]
    domains = record["plan"]["domains"]
    count = len(domains) if part in ("gain", "tenants") else 2
    figure, panels = plt.subplots(1, count, figsize=(7 * count, 4.5), squeeze=False)
    if part == "switch":
        _plot_switch(record, *panels[0])
    elif part in ("memory", "load"):
        keys = ("engine", "worker") if part == "memory" else ("tokens_per_second", "itl_p99")
        for panel, key in zip(panels[0], keys, strict=True):
            _plot_bars(record, panel, key)
    else:
        for panel, domain in zip(panels[0], domains, strict=True):
            _plot_stream(record, panel, domain)
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{record['plan']['model']}, {record['environment']['cpu']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_stream(record: Row, panel: Axes, domain: str) -> None:
    """Acceptance over the stream as it was; at the right edge that on held-out prompts, whose mixture is another."""
    last = max((answer["at"] for answer in of(record, domain=domain, phase=STREAM)), default=0.0) / 60
    for index, side in enumerate(record["plan"]["sides"]):
        colour = COLOURS[index % len(COLOURS)]
        points = smoothed(of(record, side=side, domain=domain, phase=STREAM))
        panel.plot([at / 60 for at, _ in points], [value for _, value in points], color=colour, linewidth=1)
        held_out = length(of(record, side=side, domain=domain, phase=HELD_OUT))
        if held_out is not None:
            label = f"{side}: {held_out:.2f} held out"
            panel.plot([1.03 * last], [held_out], color=colour, marker="o", linestyle="", label=label)
    _mark_versions(record, panel, domain)
    panel.set(title=domain, xlabel="minutes of its stream", ylabel="acceptance length")


def _mark_versions(record: Row, panel: Axes, tenant: str) -> None:
    """Ticks at the foot where a new version was in force."""
    for index, side in enumerate(record["plan"]["sides"]):
        states = [state for state in record["states"] if (state["side"], state["tenant"]) == (side, tenant)]
        for before, after in pairwise(states):
            if after["revision"] != before["revision"]:
                panel.axvline(after["at"] / 60, 0, 0.04, color=COLOURS[index % len(COLOURS)])


def _plot_switch(record: Row, left: Axes, right: Axes) -> None:
    sides, domains = record["plan"]["sides"], record["plan"]["domains"][:2]
    for index, side in enumerate(sides):
        colour = COLOURS[index % len(COLOURS)]
        start = 0.0
        for domain in domains:
            points = smoothed(of(record, side=side, domain=domain, phase=STREAM))
            left.plot([(start + at) / 60 for at, _ in points], [value for _, value in points], color=colour)
            start += points[-1][0] if points else 0.0
        values = [
            length(of(record, side=side, domain=domain, phase=phase))
            for domain, phase in ((domains[0], HELD_OUT), (domains[0], RETURN), (domains[1], HELD_OUT))
        ]
        right.plot(range(3), [value or float("nan") for value in values], color=colour, marker="o", label=side)
    left.set(xlabel=f"minutes of {domains[0]}, then {domains[1]}", ylabel="acceptance length")
    ticks = [f"{domains[0]}", f"{domains[0]}, after {domains[1]}", domains[1]]
    right.set_xticks(range(3), ticks)
    right.set(ylabel="acceptance length, held-out prompts")


def _plot_bars(record: Row, panel: Axes, key: str) -> None:
    rows = record["summary"]
    panel.bar(range(len(rows)), [row[key] for row in rows], color=[COLOURS[i % len(COLOURS)] for i in range(len(rows))])
    panel.set_xticks(range(len(rows)), [row["side"] for row in rows], fontsize=7)
    panel.set(ylabel={"engine": "engine, MB", "worker": "worker, MB", "itl_p99": "ITL p99, s"}.get(key, "tok/s"))


def report(record: Row, path: Path, console: Console) -> None:
    """Print the table and draw ``path``."""
    console.print(table(record))
    plot(record, path)


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.adapt.")]) -> None:
    """Prints the table of a record and draws its plot again."""
    content = json.loads(record.read_text())
    content["summary"] = summary(content)
    report(content, record.with_suffix(".png"), Console(width=180))


if __name__ == "__main__":
    typer.run(main)
