"""Dashboards and alerts as files: Grafana's schema, Prometheus's own checks, references between them."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client import REGISTRY

from benchmarks import dashboards
from benchmarks.dashboards import GRID_COLUMNS, Series, draw, format_value, query_panels
from evospec.server.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(dashboards.DASHBOARDS.glob("*.json"))
DASHBOARDS = {path.stem: json.loads(path.read_text("utf-8")) for path in FILES}
QUERIES = [t["expr"] for each in DASHBOARDS.values() for panel in query_panels(each) for t in panel["targets"]]


@pytest.fixture(scope="module")
def validator() -> Any:
    """Made from @grafana/schema: see deploy/grafana/schema/package.json."""
    return jsonschema.Draft7Validator(json.loads((DEPLOY / "grafana/schema/dashboard.schema.json").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_have_one_form_so_that_an_export_differs_only_where_it_was_edited(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    assert path.read_text("utf-8") == json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert content["uid"] == path.stem


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_satisfy_grafanas_schema(validator: Any, name: str) -> None:
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(DASHBOARDS[name])] == []


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        (("panels", 1), "type", "singlestat"),
        (("panels", 1, "options"), "colourMode", "value"),
        (("panels", 8, "fieldConfig", "defaults", "custom"), "drawStyle", "lines"),
        (("panels", 8, "targets", 0), "expr", None),
        (("templating", "list", 0), "type", "data source"),
        ((), "panel", []),
    ],
)
def test_the_schema_finds_mistakes(validator: Any, where: tuple[Any, ...], key: str, value: Any) -> None:
    dashboard = json.loads(json.dumps(DASHBOARDS["evospec-serving"]))
    place = dashboard
    for step in where:
        place = place[step]
    place[key] = value
    assert not validator.is_valid(dashboard)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    panels = DASHBOARDS[name]["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < GRID_COLUMNS


def test_a_dashboard_is_drawn_with_and_without_data(tmp_path: Path) -> None:
    dashboard = DASHBOARDS["evospec-acceptance"]
    series = [Series("acme", [0.0, 60.0], [1.0, 2.5]), Series("late", [60.0], [float("nan")])]
    draw(dashboard, {panel["id"]: series for panel in query_panels(dashboard)}, tmp_path / "full.png")
    draw(dashboard, {panel["id"]: [] for panel in query_panels(dashboard)}, tmp_path / "empty.png")
    full, empty = (tmp_path / name for name in ("full.png", "empty.png"))
    assert full.read_bytes().startswith(b"\x89PNG")
    assert full.read_bytes() != empty.read_bytes()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.256, "percentunit", "25.6 %"),
        (0.0421, "s", "42.1 ms"),
        (2.5, "s", "2.5 s"),
        (1.5 * 2**30, "bytes", "1,536 MiB"),
        (2.345, "none", "2.35"),
        (12345.6, "short", "12,346"),
        (float("nan"), "none", "–"),
    ],
)
def test_numbers_are_written_in_their_unit(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


@pytest.mark.parametrize("name", DASHBOARDS)
def test_queries_use_only_variables_of_their_dashboard(name: str) -> None:
    variables = {variable["name"] for variable in DASHBOARDS[name]["templating"]["list"]}
    used = {word for panel in DASHBOARDS[name]["panels"] for word in re.findall(r"\$\{?(\w+)", json.dumps(panel))}
    assert used <= {*variables, "__rate_interval"}


def test_every_query_can_be_of_one_server() -> None:
    """Except those of recorded series, which are sums over all."""
    selectors = [word for query in QUERIES for word in re.findall(r"(?:evospec:|process_)\w+\{?[^}]*", query)]
    assert selectors
    assert [each for each in selectors if not each.endswith('instance=~"$instance"')] == []


def test_recorded_series_that_panels_show_are_recorded() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    recorded = {rule["record"] for group in rules for rule in group["rules"] if "record" in rule}
    shown = {word for query in QUERIES for word in re.findall(r"model_tenant_domain:[\w:]+", query)}
    assert shown
    assert shown <= recorded


def test_metrics_that_panels_show_are_exported() -> None:
    """That they also have values is for ``tests/e2e/test_monitoring.py``."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    importlib.import_module("evospec.server.cli")  # and with it all that counts into REGISTRY
    registries = [Metrics("a-model").registry, REGISTRY]
    metrics = [metric for registry in registries for metric in registry.collect()]
    exported = {f"{metric.name}{suffix}" for metric in metrics for suffix in suffixes.get(metric.type, [])}
    shown = {word for query in QUERIES for word in re.findall(r"evospec:\w+", query)}
    assert shown
    assert shown <= exported


def test_compose_mounts_what_it_names() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = [volume for name in ("prometheus", "grafana") for volume in compose["services"][name]["volumes"]]
    files = [volume.partition(":")[0] for volume in mounts if volume.startswith("./")]
    assert len(files) >= 4
    assert all((DEPLOY / file).exists() for file in files)
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]
    [found] = scraped["dns_sd_configs"]
    listener = compose["services"][found["names"][0]]["environment"]["EVOSPEC_HTTP__METRICS_ADDRESS"]
    assert listener == f"0.0.0.0:{found['port']}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "rules.yml"),
        ("test", "rules", "rules.test.yml"),
    ],
)
def test_prometheus_accepts_the_configuration_and_alerts_fire_when_they_should(arguments: tuple[str, ...]) -> None:
    result = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
