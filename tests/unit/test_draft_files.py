"""Directories that are no draft, or another model's: one line that says why, whatever is in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, SpeculationConfig
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.eagle3_config import CONFIG_FILE, WEIGHTS_FILE, read_draft
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation.drafters.head import COUNTS_FILE, read_token_counts
from evospec.engine.validation import validated_files
from tests.tiny_drafts import make_draft_directory
from tests.tiny_models import VOCAB_SIZE, make_directory

NAMES = (
    "target", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "capture_layers",
    "rms_norm_eps", "vocab_size", "num_target_layers",
)  # fmt: skip
ABSURD = st.one_of(
    st.integers(-(2**70), 2**70), st.sampled_from([0, -1, 2**31, 2**63, 1e300, float("nan"), float("inf")]),
    st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(-(2**65), 2**65), max_size=4), st.just({}),
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def draft(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft_directory(tmp_path_factory.mktemp("drafts") / "draft", files)


@pytest.fixture
def copy(draft: Path, tmp_path: Path) -> Path:
    for path in draft.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def why_refused(directory: Path, files: ModelFiles) -> list[str]:
    """Lines of the reason why it is no draft of the target; none: it is one."""
    try:
        read_draft(directory).check_target(validate_model_files(files), directory)
        load_draft(directory, torch.float32, torch.device("cpu"))
    except ModelError as error:
        return str(error).splitlines()
    return []


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(NAMES), ABSURD, min_size=1, max_size=3))
def test_an_absurd_config_is_one_line(copy: Path, draft: Path, files: ModelFiles, changes: dict[str, Any]) -> None:
    before = json.loads((draft / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps(before | changes))
    assert len(why_refused(copy, files)) == 1 or set(changes) == {"target"}


def test_a_draft_may_have_the_largest_vocabulary(draft: Path) -> None:
    """That of Gemma 3."""
    replace(read_draft(draft), vocab_size=262_208)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_key_is_named(copy: Path, files: ModelFiles, name: str) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    del config[name]
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=name):
        read_draft(copy)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"target": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_none_is_one_line(copy: Path, files: ModelFiles, content: bytes) -> None:
    (copy / CONFIG_FILE).write_bytes(content)
    assert len(why_refused(copy, files)) == 1


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_damaged_weights_are_one_line_or_other_weights(copy: Path, draft: Path, files: ModelFiles, seed: int) -> None:
    chance, image = Random(seed), bytearray((draft / WEIGHTS_FILE).read_bytes())
    for _ in range(chance.randrange(1, 5)):
        image[chance.randrange(chance.choice((8, 1000, len(image))))] ^= 1 << chance.randrange(8)
    (copy / WEIGHTS_FILE).write_bytes(image[: chance.choice((len(image), chance.randrange(len(image))))])
    assert len(why_refused(copy, files)) <= 1
    (copy / COUNTS_FILE).write_bytes(image[: chance.randrange(len(image))])
    with pytest.raises(ModelError):
        read_token_counts(copy, VOCAB_SIZE)


def config_of(files: ModelFiles, **options: Any) -> EngineConfig:
    return EngineConfig(model=ModelConfig(name=str(files.path)), **options)


def test_what_can_be_known_is_known_before_anything_is_loaded(files: ModelFiles, draft: Path, tmp_path: Path) -> None:
    def eagle(directory: Path) -> SpeculationConfig:
        return SpeculationConfig(method="eagle3", draft=str(directory))

    assert validated_files(config_of(files, speculation=eagle(draft))).path == files.path
    other = make_directory(tmp_path / "other", num_hidden_layers=4)
    other_draft = make_draft_directory(tmp_path / "draft", other)
    fewer = make_directory(tmp_path / "fewer", vocab_size=VOCAB_SIZE - 8)
    cases: dict[str, dict[str, Any]] = {
        "shape differs": {"speculation": eagle(other_draft)},
        "this one says what it takes": {"speculation": SpeculationConfig(draft=str(draft), capture_layers=(0, 1, 2))},
        "needs a model": {"speculation": SpeculationConfig(method="draft_model")},
        "other tokens": {"speculation": SpeculationConfig(method="draft_model", draft=str(fewer.path))},
        "raise cache.max_bytes": {"cache": CacheConfig(max_bytes=4096)},
    }
    for reason, options in cases.items():
        with pytest.raises(ModelError, match=reason):
            validated_files(config_of(files, **options))
