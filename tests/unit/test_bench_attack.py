"""What ``benchmarks.attack`` judges by, and what it makes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.attack.attacks import ATTACKS
from benchmarks.attack.bars import Bar, at_most, exactly
from benchmarks.attack.clients import Answer
from benchmarks.attack.forge_channel import MODES, forge
from benchmarks.attack.grammar_fuzz import judge, satisfies
from benchmarks.attack.random_schemas import RandomSchemas
from benchmarks.attack.report import AFTER, BEFORE, Record
from benchmarks.attack.server import LIMITED, write_keys
from benchmarks.common.machine import REPOSITORY
from evospec.engine.online.weight_directory import WeightDirectory
from evospec.engine.online.weight_layout import WeightLayout
from evospec.server.options import AuthConfig, LimitsConfig
from evospec.server.tenants import TenantRegistry


@pytest.mark.parametrize(
    ("bar", "value", "before", "holds"),
    [
        (at_most(1), 1.0, None, True),
        (at_most(1), 1.01, None, False),
        (at_most(1), float("nan"), None, False),
        (exactly(10), 11, None, False),
        (Bar(least=0.9, of_before=True), 90, 100, True),
        (Bar(least=0.9, of_before=True), 89, 100, False),
        (Bar(least=0.9, of_before=True), 89, None, None),
    ],
)
def test_a_bar_holds_from_its_least_to_its_greatest_value(
    bar: Bar, value: float, before: float | None, holds: bool | None
) -> None:
    assert bar.holds(value, before) is holds


def test_a_record_keeps_the_other_side_and_the_other_attacks(tmp_path: Path) -> None:
    path = tmp_path / "attack.json"
    Record(path).add("drain", BEFORE, REPOSITORY, {"exit_seconds": 33})
    late, early = Record(path), Record(path)
    early.add("drain", AFTER, REPOSITORY, {"exit_seconds": 2})
    late.add("masks", AFTER, REPOSITORY, {})
    read = Record(path)
    assert read.figures("drain", BEFORE) == {"exit_seconds": 33}
    assert read.holds("drain", "exit_seconds", ATTACKS["drain"].bars["exit_seconds"]) is True
    assert read.holds("drain", "tracebacks", ATTACKS["drain"].bars["tracebacks"]) is None


@given(seed=st.integers(0, 2**32))
def test_random_schemas_are_json_name_what_they_refer_to_and_repeat_with_their_seed(seed: int) -> None:
    first, second = RandomSchemas(seed), RandomSchemas(seed)
    for _ in range(20):
        schema = first.next()
        assert json.dumps(schema) == json.dumps(second.next())
        assert "$defs" in schema or "#/$defs/" not in json.dumps(schema)


@pytest.mark.parametrize(
    ("text", "schema", "fits"),
    [
        ("5", {"type": "integer"}, True),
        ("5.5", {"type": "integer"}, False),
        ("no JSON", {}, False),
        ("1", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, True),  # enforced as anyOf
        ('"a"', {"type": "string", "pattern": "["}, None),
        ('"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"', {"type": "string", "pattern": "^(a+)+$"}, None),
    ],
)
def test_texts_are_checked_by_their_schema(text: str, schema: dict[str, object], fits: bool | None) -> None:
    assert satisfies(text, schema) is fits


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(200, 0.1, {"choices": [{"finish_reason": "stop"}]}), "served"),
        (Answer(200, 0.1, {"choices": [{"finish_reason": "length"}]}), "cut_short"),
        (Answer(400, 0.1, {}), "refused"),
        (Answer(503, 0.1, {}), "failed"),
        (Answer(0, 60.0, "timed out"), "failed"),
    ],
)
def test_answers_are_judged_by_status_and_end(answer: Answer, outcome: str) -> None:
    assert judge(answer) == outcome


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "churn"])
def test_each_mode_changes_a_channel(mode: str, tmp_path: Path) -> None:
    layout = WeightLayout.of({"a": torch.zeros(64, dtype=torch.bfloat16)})
    path = tmp_path / "weights"
    WeightDirectory.create(path, layout, num_slots=8, kind="host", version=1)
    before = path.read_bytes()
    forge(path, mode)
    assert not path.exists() or path.read_bytes() != before


def test_the_keys_file_is_one_that_the_server_reads(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml")
    registry = TenantRegistry.from_settings(AuthConfig(keys_file=tmp_path / "keys.toml"), LimitsConfig())
    for name, key in keys.items():
        tenant = registry.find(key)
        assert tenant is not None
        assert (tenant.name, tenant.requests_per_minute) == (name, 10 if name in LIMITED else None)
