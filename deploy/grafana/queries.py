"""Runs the queries of a dashboard against a Prometheus, as Grafana would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

_VARIABLE = re.compile(r"\$(model|tenant|domain|key)\b")


@dataclass(frozen=True)
class Series:
    """One line of a panel: Unix seconds and values; ``legend`` is the panel's, filled in."""

    legend: str
    times: list[float]
    values: list[float]


class Prometheus:
    """The HTTP API of a Prometheus at ``url``."""

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
