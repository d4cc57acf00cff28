"""Which draft is loaded for a configuration, and what it says where it cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from structlog.testing import capture_logs

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, RuntimeConfig, SpeculationConfig
from evospec.engine.core import EngineCore
from evospec.engine.loader import LoadedModel, load
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation import build as spec_load
from evospec.engine.speculation import draft_files
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.speculation.drafters.head import COUNTS_FILE, static_vocabulary
from evospec.engine.speculation.drafters.lookup import NgramDraft
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_drafts import make_draft_directory, random_draft
from tests.tiny_models import make_directory

RUNTIME = RuntimeConfig(device="cpu", attention_backend="torch", threads=1)
FLOAT32 = ModelConfig(dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def target(files: ModelFiles) -> LoadedModel:
    return load(EngineConfig(model=FLOAT32, runtime=RUNTIME), files, validate_model_files(files))


@pytest.fixture
def shipped(files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the draft that is shipped for the target."""
    monkeypatch.setattr(draft_files, "DRAFTS", tmp_path)
    return make_draft_directory(tmp_path / files.name, files)


def load_draft(target: LoadedModel, files: ModelFiles, **speculation: object) -> Draft | None:
    config = EngineConfig(model=FLOAT32, runtime=RUNTIME, speculation=SpeculationConfig(**speculation))
    return spec_load.load_draft(config, target, files, Tokenizer.from_files(files))


@pytest.mark.parametrize("method", ["auto", "eagle3"])
def test_the_shipped_draft(method: str, target: LoadedModel, files: ModelFiles, shipped: Path) -> None:
    draft = load_draft(target, files, method=method, vocabulary="static:64")
    assert draft is not None
    assert draft.description == "eagle3 target, vocabulary static:64"


def test_a_draft_from_elsewhere(target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path) -> None:
    shutil.move(shipped, tmp_path / "mine")
    for method in ("eagle3", "auto"):
        draft = load_draft(target, files, method=method, draft=str(tmp_path / "mine"))
        assert draft is not None
        assert draft.description == "eagle3 mine, vocabulary full"


def test_a_model_is_known_by_its_files(target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path) -> None:
    smaller = make_directory(tmp_path / "models" / "smaller")
    draft = load_draft(target, files, draft=str(smaller.path))
    assert draft is not None
    assert draft.description == f"draft model {smaller.path}, vocabulary full"


def test_ngrams_need_no_draft(target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path) -> None:
    shutil.rmtree(shipped)
    ngram = load_draft(target, files, method="ngram")
    assert ngram is not None
    assert (ngram.description, ngram.costs.total(100)) == ("ngram", 0)
    with pytest.raises(ValidationError, match="ngram has none"):
        load_draft(target, files, method="ngram", draft=str(tmp_path))
    with pytest.raises(ModelError, match="not an EAGLE-3 draft"):
        load_draft(target, files, method="eagle3")


def test_a_draft_model_takes_its_own_counts_where_the_target_has_none(
    target: LoadedModel, files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_files, "DRAFTS", tmp_path)
    smaller = make_directory(tmp_path / "models" / "smaller")
    for vocabulary, expected in (("dynamic:64+8", "dynamic:64+8"), ("static:64", "static:64"), ("auto", "full")):
        make_draft_directory(tmp_path / smaller.name, smaller)
        draft = load_draft(target, files, method="draft_model", draft=str(smaller.path), vocabulary=vocabulary)
        assert draft is not None
        assert draft.description.endswith(f"vocabulary {expected}")
    shutil.rmtree(tmp_path / smaller.name)
    with pytest.raises(ModelError, match="token counts"):
        load_draft(target, files, method="draft_model", draft=str(smaller.path), vocabulary="static:64")


def test_special_tokens_that_are_never_said_take_no_room_in_a_core(
    target: LoadedModel, files: ModelFiles, tmp_path: Path
) -> None:
    """Gemma's tokenizer has 6,249 of them."""
    tokenizer = Tokenizer.from_files(files)
    tokenizer.special_token_ids |= set(range(100, 110))
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    counts[[105, 200, 201, 202]] = torch.tensor([3, 9, 8, 7])
    save_file({"counts": counts}, tmp_path / COUNTS_FILE)
    num_ends = len(tokenizer.eos_token_ids)
    config = EngineConfig(
        model=FLOAT32, runtime=RUNTIME, speculation=SpeculationConfig(vocabulary=f"static:{num_ends + 4}")
    )
    core = spec_load.make_head(config, target, tmp_path, tokenizer)._core.token_ids
    assert core is not None
    assert set(core.tolist()) == {*tokenizer.eos_token_ids, 105, 200, 201, 202}


@pytest.mark.parametrize(
    ("method", "vocab_size", "expected"),
    [
        ("auto", 49_152, "dynamic:512+512"),
        ("eagle3", 151_936, "dynamic:512+512"),
        ("grow", 49_152, "dynamic:512+512"),
        ("draft_model", 49_152, "full"),
        ("draft_model", 151_936, "dynamic:32768+512"),
        ("auto", 1_000, "full"),
    ],
)
def test_the_default_vocabulary(method: str, vocab_size: int, expected: str) -> None:
    assert spec_load.default_vocabulary(method, True, vocab_size) == expected
    without_counts = "dynamic:4096+512" if method == "grow" else "full"
    assert spec_load.default_vocabulary(method, False, vocab_size) == without_counts


def test_where_nothing_was_counted_a_core_has_the_first_tokens_of_text(files: ModelFiles) -> None:
    tokenizer = Tokenizer.from_files(files)
    of_text = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.token_bytes(token_id)]
    core = static_vocabulary(spec_load.learned_first(tokenizer), 40, tokenizer.eos_token_ids).tolist()
    num_ends = len(tokenizer.eos_token_ids)
    assert core == sorted([*tokenizer.eos_token_ids, *of_text[: 40 - num_ends]])
    assert tokenizer.special_token_ids - set(core), "those that are never said"


def test_a_model_without_a_draft_grows_one_only_where_that_is_asked_for(files: ModelFiles) -> None:
    redis = "unix:///valkey"
    for alignment, method in (
        (AdaptersConfig(redis_url=redis), "ngram"),
        (AdaptersConfig(enabled=False, redis_url=redis), "ngram"),
        (AdaptersConfig(enabled=True, redis_url=redis), "grow"),
    ):
        assert draft_files.choose_method(EngineConfig(alignment=alignment), files) == (method, None)


@pytest.mark.parametrize("method", ["auto", "eagle3"])
def test_a_fine_tune_gets_the_draft_of_a_model_of_its_shape(
    method: str, target: LoadedModel, files: ModelFiles, shipped: Path
) -> None:
    with capture_logs() as logs:
        draft = load_draft(target, replace(files, name="a fine-tune"), method=method, vocabulary="static:64")
    assert draft is not None
    assert draft.description == f"eagle3 {shipped.name}, vocabulary static:64"
    (event,) = (one for one in logs if "same shape" in one["event"])
    assert (event["model"], event["draft"]) == ("a fine-tune", shipped.name)


def test_a_model_of_another_shape_gets_no_draft_of_others(shipped: Path, tmp_path: Path) -> None:
    other = make_directory(tmp_path / "other", num_hidden_layers=5)
    assert draft_files.choose_method(EngineConfig(), other) == ("ngram", None)


def test_a_draft_grows_in_place_of_the_shipped_one_where_that_is_asked_for(
    target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path
) -> None:
    growing = SpeculationConfig(method="grow", vocabulary="static:64")
    alignment = AdaptersConfig(redis_url="unix:///valkey", shared_directory=tmp_path / "shared")
    config = EngineConfig(model=FLOAT32, runtime=RUNTIME, speculation=growing, alignment=alignment)
    assert config.must_learn
    assert draft_files.choose_method(config, files) == ("grow", None)
    draft = spec_load.load_draft(config, target, replace(files, name="a fine-tune"), Tokenizer.from_files(files))
    assert draft is not None
    assert draft.description == "eagle3 growing for a fine-tune, vocabulary static:64", "by the counts of the other"
    with pytest.raises(ValidationError, match="grow"):
        EngineConfig(speculation=growing, alignment=AdaptersConfig(enabled=False))


def test_alignment_wants_all_drafts_from_the_draft() -> None:
    with pytest.raises(ValidationError, match="ngram"):
        EngineConfig(speculation=SpeculationConfig(method="ngram"), alignment=AdaptersConfig(enabled=True))


@pytest.mark.parametrize("speculation", [{"method": "none"}, {"num_speculative_tokens": 0}])
def test_no_speculation(speculation: dict[str, object], target: LoadedModel, files: ModelFiles, shipped: Path) -> None:
    assert load_draft(target, files, **speculation) is None


@pytest.mark.parametrize("left", [[], [COUNTS_FILE]])
def test_auto_without_a_shipped_draft_copies_and_says_so_once(
    left: list[str], target: LoadedModel, files: ModelFiles, shipped: Path
) -> None:
    for path in shipped.iterdir():
        if path.name not in left:
            path.unlink()
    with capture_logs() as logs:
        assert isinstance(load_draft(target, files), NgramDraft)
    assert [entry["event"] for entry in logs] == ["no draft is shipped for this model: repeats are copied"]


def test_what_is_no_draft_is_refused(target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: not an EAGLE-3 draft"):
        load_draft(target, files, method="eagle3", draft=str(tmp_path / "nowhere"), vocabulary="static:64")
    (shipped / "draft.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="target: not an EAGLE-3 draft"):
        load_draft(target, files)


@pytest.mark.parametrize("method", ["auto", "eagle3"])
def test_a_draft_for_another_shape_is_refused(
    method: str, target: LoadedModel, files: ModelFiles, shipped: Path, tmp_path: Path
) -> None:
    make_draft_directory(shipped, make_directory(tmp_path / "other", num_hidden_layers=4))
    with pytest.raises(ModelError, match="is for other, whose shape differs"):
        load_draft(target, files, method=method)


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_epsilon_rounded_to_float32_fits(target: LoadedModel, files: ModelFiles, shipped: Path) -> None:
    edit_config(shipped, rms_norm_eps=float(np.float32(target.spec.rms_norm_eps)))
    assert load_draft(target, files) is not None


def test_a_layer_that_the_target_lacks_is_refused(target: LoadedModel, files: ModelFiles, shipped: Path) -> None:
    edit_config(shipped, capture_layers=[0, 1, target.spec.num_layers])
    with pytest.raises(ModelError, match="shape differs"):
        load_draft(target, files)


@pytest.mark.parametrize("layers", [[2, 0, 1], [0, 0, 1]])
def test_layers_out_of_order_are_refused(
    layers: list[int], target: LoadedModel, files: ModelFiles, shipped: Path
) -> None:
    """The target's pass notes them as it comes by."""
    edit_config(shipped, capture_layers=layers)
    with pytest.raises(ModelError, match="must ascend"):
        load_draft(target, files)


def test_weights_that_do_not_fit_the_config_are_refused(target: LoadedModel, files: ModelFiles, shipped: Path) -> None:
    config = json.loads((shipped / "config.json").read_text())
    (shipped / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"down_proj.weight has the shape \(64, 192\), must be \(64, 256\)"):
        load_draft(target, files)


def test_memory_is_counted(files: ModelFiles, shipped: Path) -> None:
    """Weights and slab; for each slot one layer of keys and values and a hidden state."""
    config = EngineConfig(
        model=FLOAT32,
        cache=CacheConfig(num_blocks=8, block_size=16),
        speculation=SpeculationConfig(adaptive=False, vocabulary="static:64"),
        runtime=RUNTIME,
    )
    core = EngineCore(config, files, validate_model_files(files))
    weights = sum(weight.numel() for weight in random_draft(files).parameters())
    assert core.introduction.draft_bytes == 4 * (weights + 64 * 64 + 8 * 16 * (2 * 2 * 16 + 64))
