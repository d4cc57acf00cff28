"""Parts of dashboards; ``python -m deploy.grafana`` writes them to ``deploy/grafana/dashboards``.

A dashboard in Grafana's own format repeats itself in every panel; here each panel is its title, its unit and its
queries. ``tests/integration/test_dashboards.py`` checks the result against Grafana's schema and a real server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
GRID_COLUMNS = 24

Panel = dict[str, Any]
Query = tuple[str, str]
"""PromQL and the legend of its series."""


def timeseries(
    title: str,
    unit: str,
    *queries: Query,
    about: str,
    stacked: bool = False,
    signed: bool = False,
    most: float | None = None,
) -> Panel:
    """Lines over time, three in a row; ``most`` fixes the top of the axis, whose bottom is 0 unless ``signed``."""
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 60 if stacked else 8, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    bottom = {} if signed else {"min": 0}
    defaults = {"unit": unit, **bottom, "custom": custom}
    if most is not None:
        defaults["max"] = most
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, about, defaults, options, queries, width=8, height=8)


def stat(title: str, unit: str, query: str, *, about: str, legend: str = "", by_name: bool = False) -> Panel:
    """The newest value, six in a row; ``by_name`` shows the legend instead of the number."""
    options = {
        "colorMode": "value",
        "graphMode": "none" if by_name else "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "percentChangeColorMode": "standard",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showPercentChange": False,
        "textMode": "name" if by_name else "value",
        "wideLayout": True,
    }
    return _panel("stat", title, about, {"unit": unit}, options, [(query, legend)], width=4, height=4)


def _panel(
    kind: str,
    title: str,
    about: str,
    defaults: dict[str, Any],
    options: dict[str, Any],
    queries: Sequence[Query],
    width: int,
    height: int,
) -> Panel:
    targets = [
        {"refId": chr(ord("A") + number), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend, "range": True}
        for number, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def dashboard(
    uid: str,
    title: str,
    about: str,
    variables: Sequence[str],
    rows: dict[str, list[Panel]],
    variables_of: str = "evospec:spec_decode_num_drafts_total",
) -> dict[str, Any]:
    """A dashboard of titled rows; ``variables`` are labels to filter by, ``variables_of`` a metric that has them."""
    return {
        "uid": uid,
        "title": title,
        "description": about,
        "tags": ["evospec"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {
            "list": [_datasource_variable(), *(_label_variable(label, variables_of) for label in variables)]
        },
        "panels": _laid_out(rows),
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"}


def _label_variable(label: str, metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",  # also series without the label
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _laid_out(rows: dict[str, list[Panel]]) -> list[Panel]:
    """Panels from left to right and top to bottom under their row's title."""
    placed: list[Panel] = []
    top = 0
    for title, panels in rows.items():
        position = {"x": 0, "y": top, "w": GRID_COLUMNS, "h": 1}
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": position})
        left, top = 0, top + 1
        for panel in panels:
            width, height = panel["gridPos"]["w"], panel["gridPos"]["h"]
            if left + width > GRID_COLUMNS:
                left, top = 0, top + height
            placed.append({**panel, "gridPos": {"x": left, "y": top, "w": width, "h": height}})
            left += width
        top += panels[-1]["gridPos"]["h"]
    return [{"id": number, **panel} for number, panel in enumerate(placed, 1)]
