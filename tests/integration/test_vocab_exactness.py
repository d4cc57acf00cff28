"""Vocabularies that follow their sessions never change an output: float32 engines with and without, token for token.

On a tiny random model. Its drafts are random (hardly ever right) or the model itself (nearly always). The vocabularies
of one batch differ, change in mid-sequence, start from snapshots of all kinds, and belong to two tenants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.vocabulary.hard_switch import switch_hard
from evospec.engine.config import DynamicConfig, SpeculationConfig
from evospec.engine.draft_vocab.bigram_graph import build_bigram_graph
from evospec.engine.draft_vocab.snapshot import decode
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.models.config import ModelFiles
from evospec.engine.speculation import draft_files
from evospec.engine.speculation.drafters.head import COUNTS_FILE
from evospec.engine.speculation.drafters.session_head import GRAPH_FILE
from tests import exactness
from tests.combinations import pairwise
from tests.exactness import NUM_TOKENS, make_sampling
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import VOCAB_SIZE, make_directory

SETTINGS = {**exactness.SETTINGS, "preemption": Setting(num_blocks=12)}
OPTIONS: dict[str, dict[str, object]] = {
    "all": {"target_signal": "every"},
    "semantic": {"semantic": True, "target_signal": "events"},
    "fixed": {"prior": "fixed", "replacement": "lru", "graph": False},
    "no prior": {"prior": "off", "replacement": "lru", "tenant_memory": False},
    "few": {"max_sessions": 2, "target_signal": "off", "in_context": False},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"temperature": 0.7, "top_k": 20},
    "penalties": {"repetition_penalty": 1.3},
    "min_p": {"temperature": 0.4, "min_p": 0.1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def drafts(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpeculationConfig]:
    """What to draft with, by name."""
    directory = make_draft_directory(tmp_path_factory.mktemp("draft") / "eagle", files)
    _write_graph(directory)
    of_layer = SpeculationConfig(method="eagle3", draft=str(directory), adaptive=False)
    of_target = SpeculationConfig(method="draft_model", draft=str(files.path), adaptive=False)
    return {"eagle3": of_layer, "target itself": of_target, "n-grams, else eagle3": of_layer}


@pytest.fixture(autouse=True)
def shipped(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token counts and a graph where a draft model looks for them; semantic indices go where the test ends."""
    monkeypatch.setattr(draft_files, "DRAFTS", tmp_path)
    (tmp_path / files.name).mkdir()
    save_file({"counts": torch.arange(VOCAB_SIZE)}, tmp_path / files.name / COUNTS_FILE)
    _write_graph(tmp_path / files.name)


def _write_graph(directory: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, 40, (5000,), generator=generator, dtype=torch.int32).numpy()
    build_bigram_graph([text], VOCAB_SIZE).save(directory / GRAPH_FILE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """1 to 90 tokens; the last two repeat themselves, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (90, 1, 16, 33, 40)]
    return [*texts, texts[0][:7] * 9, texts[0][:50]]


@pytest.fixture(scope="module")
def sampling(prompts: list[list[int]]) -> dict[str, list[SamplingParams]]:
    return {kind: make_sampling(kind, len(prompts), SAMPLED) for kind in ("greedy", "sampled")}


@pytest.fixture(scope="module")
def expected(
    files: ModelFiles, prompts: list[list[int]], sampling: dict[str, list[SamplingParams]]
) -> dict[str, list[list[int]]]:
    """Without speculation."""
    engine = Engine(files, SETTINGS["alone"])
    return {kind: engine.generate_alone(prompts, params) for kind, params in sampling.items()}


def make_engine(
    files: ModelFiles,
    draft: SpeculationConfig,
    setting: str,
    vocabulary: str,
    cache: Path,
    options: dict[str, object] | None = None,
    length: int = 4,
) -> Engine:
    update = {
        "num_speculative_tokens": length,
        "vocabulary": vocabulary,
        "dynamic": DynamicConfig(**(options or {})),
    }
    return Engine(files, SETTINGS[setting], draft.model_copy(update=update), cache_dir=cache)


def run(
    engine: Engine,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    snapshots: list[bytes] | None = None,
) -> tuple[list[list[int]], list[bytes]]:
    """Outputs and snapshots of all prompts at once, every second one of another tenant and domain."""
    states = [
        SessionState(snapshot=snapshots[place] if snapshots else b"", domain=("law", "")[place % 2])
        for place in range(len(prompts))
    ]
    tenants = [("one", "two")[place % 2] for place in range(len(prompts))]
    outputs = engine.generate(prompts, sampling, tenants, states)
    return outputs, list(engine.snapshots.values())


@pairwise(
    setting=SETTINGS,
    vocabulary=["dynamic:64+32", "dynamic:8+300", "dynamic:full+0"],
    draft=["eagle3", "target itself", "n-grams, else eagle3"],
    kind=["greedy", "sampled"],
)
def test_outputs_are_those_without_speculation(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    prompts: list[list[int]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[str, list[list[int]]],
    kind: str,
    draft: str,
    vocabulary: str,
    setting: str,
    tmp_path: Path,
) -> None:
    """And those of the sessions' second requests, which start from what the first have left."""
    engine = make_engine(files, drafts[draft], setting, vocabulary, tmp_path)
    if draft == "n-grams, else eagle3":  # its vocabulary drafts in some steps of a sequence only
        switch_hard(engine.core)
    outputs, snapshots = run(engine, prompts, sampling[kind])
    assert outputs == expected[kind]
    assert engine.num_drafted > 0
    assert all(snapshots)
    assert run(engine, prompts, sampling[kind], snapshots)[0] == expected[kind]
    assert engine.core.stats().vocabularies_used == 0
    assert (engine.core.stats().preemptions > 0) == (setting == "preemption")


@pairwise(options=OPTIONS, draft=["eagle3", "target itself"], kind=["greedy", "sampled"])
def test_with_every_part_on_or_off(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    prompts: list[list[int]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[str, list[list[int]]],
    kind: str,
    draft: str,
    options: str,
    tmp_path: Path,
) -> None:
    engine = make_engine(files, drafts[draft], "batch", "dynamic:16+40", tmp_path, OPTIONS[options], length=6)
    for _ in range(2):
        assert run(engine, prompts, sampling[kind])[0] == expected[kind]


def test_damaged_snapshots_start_cold(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    prompts: list[list[int]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[str, list[list[int]]],
    tmp_path: Path,
) -> None:
    engine = make_engine(files, drafts["eagle3"], "batch", "dynamic:64+32", tmp_path)
    _, sound = run(engine, prompts, sampling["greedy"])
    damaged = [data[:-9] if place % 2 else b"\xff" * 40 for place, data in enumerate(sound)]
    outputs, snapshots = run(engine, prompts, sampling["greedy"], damaged)
    assert outputs == expected["greedy"]
    assert engine.core.stats().snapshots_refused == len(prompts)
    for data in snapshots:
        assert decode(data, engine.core.introduction.vocabulary, VOCAB_SIZE).num_verified_tokens == NUM_TOKENS


@pytest.mark.parametrize("draft", ["eagle3", "target itself"])
def test_an_engine_that_measures_its_costs_answers_the_same_and_keeps_nothing_of_what_it_made_up(
    files: ModelFiles,
    drafts: dict[str, SpeculationConfig],
    prompts: list[list[int]],
    sampling: dict[str, list[SamplingParams]],
    expected: dict[str, list[list[int]]],
    draft: str,
    tmp_path: Path,
) -> None:
    adaptive = drafts[draft].model_copy(update={"adaptive": True})
    engine = make_engine(files, adaptive, "batch", "dynamic:64+32", tmp_path)
    assert engine.core.step_costs is not None
    assert engine.core.stats().vocabularies_used == 0
    for kind in ("greedy", "sampled"):
        assert run(engine, prompts, sampling[kind])[0] == expected[kind]
