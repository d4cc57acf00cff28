"""Draws how many times the speed of others the default has: ``python -m benchmarks.grid.plot FILE...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.drafting import NONE
from benchmarks.common.machine import RESULTS
from benchmarks.grid.plan import DEFAULT, LOOKUP
from benchmarks.grid.report import of_side, ratio, read, sides_of_all

COLOURS = {1: "#c2410c", 8: "#0f766e", 32: "#1d4ed8"}
"""By requests at a time."""


def label(side: str) -> str:
    """What a side is called in the picture."""
    return {NONE: "no drafts", LOOKUP: "prompt lookup alone"}.get(side, side.replace(" frequent", " frequent tokens"))


def draw(panel: Axes, cells: Sequence[Mapping[str, Any]], title: str) -> None:
    """A line for each rival, a point for each load, with its interval."""
    names = [side for side in sides_of_all(cells) if side != DEFAULT]
    loads = sorted({cell["load"] for cell in cells})
    for number, load in enumerate(loads):
        of_load = [cell for cell in cells if cell["load"] == load]
        found = [ratio(of_side(of_load, DEFAULT), of_side(of_load, name)) for name in names]
        middles = [middle for middle, _, _ in found]
        errors = [[middle - low for middle, low, _ in found], [high - middle for middle, _, high in found]]
        places = [place + 0.22 * (number - (len(loads) - 1) / 2) for place in range(len(names))]
        style: dict[str, Any] = {"fmt": "o", "markersize": 4, "capsize": 2, "color": COLOURS.get(load, "#6b7280")}
        panel.errorbar(middles, places, xerr=errors, label=f"{load} at a time", **style)
    panel.axvline(1.0, color="#9ca3af", linewidth=1)
    panel.set_yticks(range(len(names)), [label(name) for name in names])
    panel.invert_yaxis()
    panel.set(title=title, xlabel="times the tokens a second of")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)


def main(
    records: Annotated[list[Path], typer.Argument(help="Of the grid, a model each.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = RESULTS / "grid.png",
) -> None:
    """Draw a panel for each model, of its greedy cells."""
    figure = Figure(figsize=(5.5 * len(records), 3.6), layout="tight")
    panels = figure.subplots(1, len(records), squeeze=False)
    for panel, path in zip(panels[0], records, strict=True):
        cells = [cell for cell in read(path) if cell["temperature"] == 0.0]
        draw(panel, cells, cells[0]["model"])
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    typer.run(main)
