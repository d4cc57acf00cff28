"""The dashboards of ``deploy/grafana`` where there is no Grafana: their queries asked, and pictures of the answers.

``python -m benchmarks.dashboards DIRECTORY`` draws all of them; colours and layout are near to what Grafana shows.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

DASHBOARDS = Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards"
GRID_COLUMNS = 24

_VARIABLE = re.compile(r"\$(instance|model|tenant|domain|key)\b")
_ROW_INCHES = 0.36
_BACKGROUND, _PANEL, _TEXT, _GRID = "#111217", "#181b1f", "#ccccdc", "#2c2f36"
_LINES = ["#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#37872d"]


@dataclass(frozen=True)
class Series:
    """One line of a panel: Unix seconds and values; ``legend`` is the panel's, filled in."""

    legend: str
    times: list[float]
    values: list[float]


class Prometheus:
    """The HTTP API of a Prometheus at ``url``, asked as Grafana asks it."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def get(self, path: str, **parameters: str | float) -> Any:
        """``data`` of an API call; raises ``ValueError`` with Prometheus's own words if it refuses."""
        body = self._client.get(f"/api/v1/{path}", params=parameters).json()
        if body["status"] != "success":
            raise ValueError(f"{body['error']}: {parameters}")
        return body["data"]

    def panel(self, panel: dict[str, Any], start: float, end: float, rate_interval: str) -> list[Series]:
        """All series of a panel between two Unix times, at most about 200 points each."""
        series = []
        for target in panel["targets"]:
            expression = expand(target["expr"], rate_interval)
            step = max(1.0, (end - start) / 200)
            for result in self.get("query_range", query=expression, start=start, end=end, step=step)["result"]:
                times, values = zip(*result["values"], strict=True)
                legend = _legend(target["legendFormat"], result["metric"])
                series.append(Series(legend, list(times), [float(value) for value in values]))
        return series


def expand(expression: str, rate_interval: str) -> str:
    """PromQL with Grafana's variables filled in: everything is chosen."""
    return _VARIABLE.sub(".*", expression.replace("$__rate_interval", rate_interval))


def query_panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels that have queries."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def _legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template).strip()


def format_value(value: float, unit: str) -> str:
    """A number as Grafana writes it in ``unit``."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw(dashboard: dict[str, Any], data: dict[int, list[Series]], path: Path) -> None:
    """A PNG of all panels; ``data`` has the series of each panel id."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(16, rows * _ROW_INCHES), facecolor=_BACKGROUND)
    figure.text(0.01, 0.995, dashboard["title"], color=_TEXT, fontsize=13, va="top", weight="bold")
    margin = 1.2 / rows  # room for the title
    for panel in panels:
        grid = panel["gridPos"]
        left, width = grid["x"] / GRID_COLUMNS, grid["w"] / GRID_COLUMNS
        bottom = (1 - margin) * (1 - (grid["y"] + grid["h"]) / rows)
        height = (1 - margin) * grid["h"] / rows
        if panel["type"] == "row":
            figure.text(left + 0.01, bottom + height / 3, panel["title"], color=_TEXT, fontsize=10)
            continue
        axes = figure.add_axes((left + 0.032, bottom + 0.24 * height, width - 0.042, 0.6 * height), facecolor=_PANEL)
        axes.set_title(panel["title"], loc="left", color=_TEXT, fontsize=8)
        (_draw_stat if panel["type"] == "stat" else _draw_lines)(axes, panel, data[panel["id"]])
    figure.savefig(path, dpi=100, facecolor=_BACKGROUND)


def _draw_stat(axes: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    by_name = panel["options"]["textMode"] == "name"
    words = [each.legend if by_name else format_value(each.values[-1], unit) for each in series] or ["no data"]
    text = "\n".join(textwrap.fill(word, 28) for word in words)
    axes.text(0.5, 0.45, text, color=_LINES[0], fontsize=8 if by_name else 18, ha="center", va="center")


def _draw_lines(axes: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.tick_params(colors=_TEXT, labelsize=6)
    axes.grid(color=_GRID, linewidth=0.5)
    axes.spines[:].set_visible(False)
    axes.set_prop_cycle(color=_LINES)
    if "stacking" in defaults["custom"] and series:
        _stack(axes, series)
    else:
        for each in series:
            axes.plot(_moments(each.times), each.values, linewidth=1, label=each.legend)
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, defaults["unit"])))
    axes.xaxis_date()
    locator = AutoDateLocator(maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    if series:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=min(6, len(series)), frameon=False,
            labelcolor=_TEXT, fontsize=6, handlelength=1, columnspacing=1,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no data", color=_TEXT, ha="center", transform=axes.transAxes)


def _stack(axes: Axes, series: list[Series]) -> None:
    """Series may begin at different times: where one has no value it counts as 0."""
    every = sorted({second for each in series for second in each.times})
    by_time = [dict(zip(each.times, each.values, strict=True)) for each in series]
    heights = [[values.get(second, 0.0) for second in every] for values in by_time]
    axes.stackplot(_moments(every), heights, labels=[each.legend for each in series], alpha=0.7)


def _moments(seconds: Sequence[float]) -> list[float]:
    """Unix seconds as matplotlib's dates (UTC)."""
    return [float(date2num(datetime.fromtimestamp(second, UTC))) for second in seconds]


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the PNGs, one a dashboard.")],
    url: Annotated[str, typer.Option(help="The Prometheus.")] = "http://127.0.0.1:9090",
    seconds: Annotated[float, typer.Option(help="How far back from now.")] = 3600,
    rate_interval: Annotated[str, typer.Option(help="Window of rates; at least four scrapes.")] = "20s",
) -> None:
    """Draws all dashboards of this project."""
    prometheus = Prometheus(url)
    out.mkdir(parents=True, exist_ok=True)
    end = time.time()
    for path in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(path.read_text())
        data = {p["id"]: prometheus.panel(p, end - seconds, end, rate_interval) for p in query_panels(dashboard)}
        draw(dashboard, data, out / f"{path.stem}.png")
        print(out / f"{path.stem}.png")


if __name__ == "__main__":
    typer.run(main)
