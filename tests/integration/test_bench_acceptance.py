"""Acceptance measured with tiny models: a target that drafts for itself is right, and sessions go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import acceptance
from benchmarks.common.acceptance import length
from benchmarks.common.drafting import Drafting
from benchmarks.vocabulary import sessions
from benchmarks.vocabulary.sessions import Ask, answers, counts, make_sides, recorded
from evospec.engine.models.config import ModelFiles
from tests.tiny_drafts import make_draft_directory
from tests.tiny_models import make_directory

SETS = {"law": [[{"role": "user", "content": f"The quick brown fox jumps over {i} dogs."}] for i in range(3)]}
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target", max_position_embeddings=2048)


def test_a_target_that_drafts_for_itself_is_right(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 may differ at near ties."""
    monkeypatch.setattr(sessions, "RESULTS", tmp_path)
    sides = make_sides(["full"], str(files.path), Drafting("draft_model", str(files.path)))
    found = (labels | counts(run) for labels, run in answers(sides, acceptance.asks(SETS), MAX_TOKENS))
    runs = recorded("tiny", {"model": "tiny"}, found)
    assert [run["number"] for run in runs] == [0, 1, 2]
    assert length(runs) > 4.5
    assert json.loads((tmp_path / "tiny.json").read_text())["runs"] == runs


def test_a_session_goes_on_and_a_stranger_has_none(files: ModelFiles, tmp_path: Path) -> None:
    draft = make_draft_directory(tmp_path / "draft", files)
    modes, drafting = ["dynamic:16+64", "dynamic:16+64/cold"], Drafting("eagle3", str(draft))
    sides = make_sides(modes, str(files.path), drafting)
    asks = [({"set": "law"}, Ask(messages, "one", "tenant", goes_on=True)) for messages in SETS["law"]]
    snapshots: dict[str, list[bytes | None]] = {mode: [] for mode in modes}
    for labels, run in answers(sides, asks, MAX_TOKENS):
        snapshots[labels["mode"]] += run.snapshots
    sizes = [len(snapshot or b"") for snapshot in snapshots[modes[0]]]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert snapshots[modes[1]] == [None] * 3
