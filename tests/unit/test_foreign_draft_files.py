"""Drafts of other projects: how their layers are counted, and what is refused by name before anything is loaded."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.config import EngineConfig, ModelConfig, SpeculationConfig
from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.eagle3_import import check_foreign_draft
from evospec.engine.models.eagle3_weights import load_weights
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation.speculator import AcceptanceAlarm
from evospec.engine.validation import validated_files
from tests.foreign_drafts import CHECKPOINTS, NUM_LAYERS, VOCAB
from tests.tiny_models import make_directory

LAYERS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target", num_hidden_layers=NUM_LAYERS)


def load(directory: Path, files: ModelFiles) -> None:
    load_weights(directory, validate_model_files(files), None, torch.float32, torch.device("cpu"))


def why_refused(directory: Path, files: ModelFiles) -> list[str]:
    """Lines of the reason why it cannot be loaded; none: it can be."""
    try:
        load(directory, files)
    except ModelError as error:
        return str(error).splitlines()
    return []


def check(files: ModelFiles, draft: Path, alignment: bool = False, **speculation: Any) -> None:
    """As a start does, before any port opens."""
    config = EngineConfig(
        model=ModelConfig(name=str(files.path)),
        speculation=SpeculationConfig(draft=str(draft), **speculation),
        alignment=AdaptersConfig(enabled=alignment),
    )
    validated_files(config)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("specforge", {"eagle_config": {LAYERS: [1, 2, 6]}}, (1, 2, 6)),
        ("specforge", {"eagle_config": {LAYERS: [2, 3, 7]}}, (1, 2, 6)),
        ("specforge", {"eagle_config": {}}, (1, 3, 4)),
        ("nvidia", {"eagle_config": {LAYERS: [4, 6, 8], "norm_before_fc": True}}, (3, 5, 7)),
        ("speculators", {LAYERS: [1, 4, 7]}, (0, 3, 6)),
        ("speculators", {LAYERS: None}, (1, 3, 4)),
    ],
)
def test_how_layers_are_counted(
    name: str, changes: dict[str, Any], expected: tuple[int, ...], files: ModelFiles, tmp_path: Path
) -> None:
    directory, spec = CHECKPOINTS[name]().write(tmp_path / "draft", **changes), validate_model_files(files)
    found, told = (check_foreign_draft(directory, spec, layers) for layers in (None, (0, 1, 5)))
    assert found is not None
    assert told is not None
    assert (found.capture_layers, told.capture_layers) == (expected, (0, 1, 5))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nvidia", {"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, r"multi-head latent attention \(MLA\)"),
        ("nvidia", {"kv_lora_rank": 512}, r"multi-head latent attention \(MLA\)"),
        ("speculators", {"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
        ("speculators", {"speculators_model_type": "peagle"}, "P-EAGLE"),
        ("nvidia", {"eagle_config": {"parallel_draft_step": 4}}, "parallel drafting"),
        ("speculators", {"speculators_model_type": "eagle"}, "not an EAGLE-3 draft"),
        ("nvidia", {"eagle_config": {"use_aux_hidden_state": False}}, "not an EAGLE-3 draft"),
        ("specforge", {"num_hidden_layers": 2}, "a draft of 2 layers is not supported"),
        ("specforge", {"hidden_act": "relu"}, "hidden_act relu"),
        ("specforge", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("specforge", {"rope_scaling": {"rope_type": "mrope"}}, "rope scaling 'mrope'"),
        ("specforge", {"rope_scaling": {"rope_type": "yarn", "factor": 1e30, "beta_fast": 1}}, "make no sense"),
        ("specforge", {"rope_scaling": {"rope_type": "yarn", "beta_slow": 1e-320}}, "make no sense"),
        ("specforge", {"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": -1e30}}, "make no sense"),
        ("specforge", {"eagle_config": {LAYERS: [0, 3, 7]}}, r"layers \(-1, 2, 6\)"),
        ("specforge", {"eagle_config": {LAYERS: [1, 3, 8]}}, r"layers \(1, 3, 8\)"),
        ("specforge", {"eagle_config": {LAYERS: [1, 3]}}, "fc.weight has the shape"),
        ("specforge", {"eagle_config": {LAYERS: "all"}}, "must be an integer or a list"),
        (
            "specforge",
            {"vocab_size": VOCAB + 1},
            "is for another model, 64 wide with 513 tokens; this one is 64 wide with 512",
        ),
        ("specforge", {"hidden_size": 96}, "is for another model, 96 wide"),
        ("specforge", {"hidden_size": 96, "target_hidden_size": 64}, "has the shape"),
        ("specforge", {"hidden_size": -1, "target_hidden_size": 64}, "hidden_size is -1"),
        ("speculators", {"target_hidden_size": 32}, "is for tiny/target, 32 wide"),
        ("specforge", {"fc_norm": True}, "no tensor fc_norm.0.weight"),
        ("nvidia", {"eagle_config": {}}, "nothing is known of a tensor input_norm.weight"),
        ("safeailab", {"vocab_size": VOCAB + 1}, "with 513 tokens"),
        ("nvidia_copied_head", {"partial_rotary_factor": 4.0}, "more dimensions turn than the 16 of a head"),
        ("nvidia_copied_head", {"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ("nvidia_copied_head", {"layer_types": ["sliding_attention"], "sliding_window": -5}, "sliding_window is -5"),
    ],
)
def test_refused_before_anything_is_loaded(
    name: str, changes: dict[str, Any], reason: str, files: ModelFiles, tmp_path: Path
) -> None:
    directory = CHECKPOINTS[name]().write(tmp_path / "draft", **changes)
    with pytest.raises(ModelError, match=reason) as raised:
        check(files, directory)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["speculators", "safeailab"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask_hidden": torch.zeros(1, 192)}, "P-EAGLE"),
        ({"layers.1.mlp.up_proj.weight": torch.zeros(96, 64)}, "several layers"),
        ({"layers.0.self_attn.kv_a_proj_with_mqa.weight": torch.zeros(96, 64)}, "MLA"),
        ({"layers.0.self_attn.o_proj.bias": torch.zeros(64)}, "nothing is known of a tensor layers.0.self_attn.o_proj"),
        ({"norm.weight": torch.zeros(65)}, "output_norm has the shape"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, "output_norm is of type"),
        ({"norm.weight": torch.zeros(())}, "norm.weight have the shapes"),
        ({"d2t": torch.zeros(161, dtype=torch.long)}, "d2t has the shape"),
        ({"norm.weight": None}, "no tensor norm.weight"),
        ({"d2t": None}, "no d2t says which"),
        ({"lm_head.weight": torch.zeros(0, 64), "d2t": torch.zeros(0, dtype=torch.long)}, "head_size is 0"),
    ],
)
def test_tensors_that_are_refused(
    name: str, change: dict[str, torch.Tensor | None], reason: str, files: ModelFiles, tmp_path: Path
) -> None:
    """Of safetensors before anything is loaded; of a pickle when it is."""
    checkpoint = CHECKPOINTS[name]()
    tensors = {key: tensor for key, tensor in (checkpoint.tensors | change).items() if tensor is not None}
    directory = replace(checkpoint, tensors=tensors).write(tmp_path / "draft")
    with pytest.raises(ModelError, match=reason):
        load(directory, files)
    if checkpoint.file == "model.safetensors":
        with pytest.raises(ModelError, match=reason):
            check(files, directory)


@pytest.mark.parametrize(
    ("token_ids", "is_drafted", "reason"),
    [
        (torch.arange(160) * 2, torch.arange(VOCAB) < 160, "d2t and t2d disagree"),
        (torch.arange(160) * 4, None, "does not name tokens of the model"),
        (torch.arange(160) - 1, None, "does not name tokens of the model"),
        (torch.arange(160) // 2, None, "or one twice"),
    ],
)
def test_maps_of_tokens_that_are_refused(
    token_ids: torch.Tensor, is_drafted: torch.Tensor | None, reason: str, files: ModelFiles, tmp_path: Path
) -> None:
    checkpoint = CHECKPOINTS["specforge"]()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "t2d"}
    tensors |= {"d2t": token_ids - torch.arange(160)} | ({} if is_drafted is None else {"t2d": is_drafted})
    with pytest.raises(ModelError, match=reason):
        load(replace(checkpoint, tensors=tensors).write(tmp_path / "draft"), files)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a draft has run code')",)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(Code(), 2), pickle.dumps([1, 2], 2)])
def test_a_pickle_runs_no_code(content: bytes, files: ModelFiles, tmp_path: Path) -> None:
    directory = CHECKPOINTS["safeailab"]().write(tmp_path / "draft")
    (directory / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as raised:
        load(directory, files)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("values", [torch.empty(64, device="meta"), torch.ones(64).to_sparse()])
def test_tensors_of_a_pickle_have_all_of_their_values(values: torch.Tensor, files: ModelFiles, tmp_path: Path) -> None:
    checkpoint = CHECKPOINTS["safeailab"]()
    directory = replace(checkpoint, tensors=checkpoint.tensors | {"norm.weight": values}).write(tmp_path / "draft")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: must hold tensors by name, with all of their values"):
        load(directory, files)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS["safeailab"]().write(tmp_path_factory.mktemp("drafts") / "draft")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Defining your")
def test_a_damaged_pickle_is_one_line_or_other_weights(pickled: Path, files: ModelFiles, zipped: bool) -> None:
    path, chance = pickled / "pytorch_model.bin", Random(0)
    torch.save(CHECKPOINTS["safeailab"]().tensors, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole[: chance.choice((len(whole), chance.randrange(len(whole))))])
        for at in chance.choices(range(min(len(damaged), 2000)), k=chance.randrange(4)):
            damaged[at] = chance.randrange(256)
        path.write_bytes(damaged)
        assert len(why_refused(pickled, files)) <= 1


def test_a_hub_id_is_a_draft_by_its_files(tmp_path: Path) -> None:
    """With the snapshots in the cache already, in the hub library's own layout."""
    for name in ("specforge", "safeailab"):
        repository = tmp_path / "hub" / f"models--org--{name}"
        CHECKPOINTS[name]().write(repository / "snapshots" / "abc123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc123")
    make_directory(tmp_path / "hub" / "models--org--model" / "snapshots" / "abc123")
    shutil.copytree(repository / "refs", tmp_path / "hub" / "models--org--model" / "refs")
    script = (
        "from pathlib import Path\n"
        "from evospec.engine.config import EngineConfig, ModelConfig, SpeculationConfig\n"
        "from evospec.engine.models.config import ModelFiles\n"
        "from evospec.engine.speculation.draft_files import choose_method\n"
        "files = ModelFiles('any', Path('any'), 'gguf')\n"
        "for name in ('specforge', 'safeailab', 'model', 'absent'):\n"
        f"    model, draft = ModelConfig(cache_dir={str(tmp_path)!r}), SpeculationConfig(draft='org/' + name)\n"
        "    print(choose_method(EngineConfig(model=model, speculation=draft), files))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    found = [("eagle3", tmp_path / f"hub/models--org--{name}/snapshots/abc123") for name in ("specforge", "safeailab")]
    assert run.stdout.splitlines() == [*map(str, found), str(("draft_model", None))]
    assert "org/absent: cannot be fetched from the hub" in run.stderr


def test_options_that_do_not_go_with_it(files: ModelFiles, tmp_path: Path) -> None:
    own, shared = (CHECKPOINTS[name]().write(tmp_path / name) for name in ("specforge", "headless"))
    check(files, own, vocabulary="dynamic:full+64")
    check(files, shared, vocabulary="dynamic:full+0")
    with pytest.raises(ModelError, match="for drafts with a head of their own"):
        check(files, shared, vocabulary="dynamic:full+64")
    with pytest.raises(ModelError, match="alignment trains drafts of this project only"):
        check(files, shared, alignment=True)
    (own / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="corrupt or truncated"):
        check(files, own)
    (own / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model"):
        check(files, own)


def test_the_alarm_rings_once_for_a_draft_that_is_hardly_ever_right() -> None:
    for num_right, expected in (([0] * 9 + [1], 1), ([0, 1, 0, 0, 2], 0)):
        alarm = AcceptanceAlarm()
        with capture_logs() as logs:
            for _ in range(100):
                for count in num_right:
                    alarm.record(count)
        assert [entry["event"] for entry in logs] == ["the draft is hardly ever right"] * expected
