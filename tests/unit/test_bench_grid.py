"""The grid's arithmetic: what a request costs beside others, and how sure a ratio is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from benchmarks.common.in_process import Turn, take_turns
from benchmarks.grid import run
from benchmarks.grid.report import loop_share, ratio
from benchmarks.prompts.sets import read_sets
from evospec.engine.messages import EngineOutput, SamplingParams


class Steps:
    """An engine whose steps take a second, and give every request that runs a token."""

    def __init__(self, lengths: list[int]) -> None:
        self._left, self._running = lengths[::-1], dict[str, int]()

    def start(self, turn: Turn, sampling: SamplingParams) -> str:
        name = str(len(self._left))
        self._running[name] = self._left.pop()
        return name

    def step(self) -> tuple[list[EngineOutput], None]:
        outputs = []
        for name in list(self._running):
            self._running[name] -= 1
            reason: Literal["stop"] | None = None if self._running[name] else "stop"
            outputs.append(EngineOutput(request_id=name, token_ids=[7], finish_reason=reason))
            if reason:
                del self._running[name]
        return outputs, None


def test_a_steps_seconds_are_shared_by_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    turns, sampling = [Turn([1])] * 3, SamplingParams(max_tokens=9, seed=0)
    [progress] = take_turns([run.answering(Steps([1, 3, 2]), turns, sampling, 2)])  # type: ignore[arg-type]
    assert [len(one.token_ids) for one in progress.requests] == [1, 3, 2]
    assert [one.cost for one in progress.requests] == [0.5, 1.5, 1.0]
    assert [one.first for one in progress.requests] == [1.0, 1.0, 1.0]
    assert [one.gaps for one in progress.requests] == [[], [1.0, 1.0], [1.0]]
    assert progress.seconds == 3.0


def test_an_interval_holds_the_ratio_and_is_the_narrower_the_more_prompts_agree() -> None:
    rng = random.Random(1)

    def requests(spread: float) -> list[dict[str, float]]:
        return [{"cost": 1 + spread * rng.random()} for _ in range(40)]

    base = [{"cost": 2.0}] * 40
    widths = []
    for spread in (0.0, 0.1, 1.0):
        middle, low, high = ratio(requests(spread), base)
        assert low <= middle <= high
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[0] == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("A sentence that says one thing, and another that says more.", 0.0),
        ("It was said. " * 5, 1.0),
        ("First of all. " + "It was said. " * 2 + "Then no more.", 0.0),
        ("0123456789abcdefghijklmnopqrstuvwxyz" + "said again. " * 3, 0.5),
    ],
)
def test_a_loop_is_what_is_said_three_times_in_a_row(text: str, share: float) -> None:
    assert loop_share(text) == pytest.approx(share, abs=0.02)


def test_sets_are_of_tasks_or_files(tmp_path: Path) -> None:
    first, second = tmp_path / "spec-eval.jsonl", tmp_path / "law-eval.jsonl"
    rows = [{"task": task, "turns": [f"{task} {n}", "more"]} for n in range(3) for task in ("qa", "rag")]
    first.write_text("\n".join(map(json.dumps, rows)))
    second.write_text(json.dumps({"prompt": "a law"}))
    sets = read_sets([first, second], count=2)
    assert {name: len(prompts) for name, prompts in sets.items()} == {"qa": 2, "rag": 2, "law": 1, "human-eval": 2}
    assert sets["qa"][1] == [{"role": "user", "content": "qa 1"}]
