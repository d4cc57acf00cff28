"""Files that cannot be served are refused, by name and reason, from their headers alone."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.families.base import Family
from evospec.engine.models.families.known import FAMILIES, spec_from_config
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.gguf_spec import spec_from_gguf
from evospec.engine.models.registry import validate_model_files
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_directory, make_gguf, tiny_config

HUGE = 4 * 10**12
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_directory(tmp_path_factory.mktemp("models") / "tiny").path


@pytest.fixture(scope="module")
def gguf_bytes(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    return make_gguf(path, directory, GGMLQuantizationType.Q4_0).path.read_bytes()


def refusal(path: Path, content: bytes) -> str:
    """The message with which a GGUF file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(ModelError) as refused:
        validate_model_files(ModelFiles("broken", path, "gguf"))
    assert str(path) in str(refused.value)
    return str(refused.value)


def gguf_file(directory: Path, content: bytes) -> GGUFFile:
    """Its metadata may be changed."""
    path = directory / "tiny.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check_sound(spec: ModelSpec) -> None:
    assert (spec.architecture, spec.vocab_size, spec.hidden_size, spec.num_layers) == ("llama", 512, 64, 3)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.intermediate_size) == (4, 2, 16, 128)
    assert spec.max_position_embeddings == 256
    assert spec.rms_norm_eps == pytest.approx(1e-5)
    assert (spec.bos_token_id, set(spec.eos_token_ids)) == (0, {0, 2})


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ({5: "<|end|>", 6: "<|eot_id|>"}, {2, 0, 5, 6}),
        ({5: "<|end|>", 6: "<|return|>", 7: "<|call|>"}, {2, 0, 6, 7}),
        ({5: "<|eot_id|>", 6: "<|eom_id|>", 7: "<|start_header_id|>"}, {2, 0, 5, 6}),
    ],
    ids=["phi", "gpt-oss", "llama 3.1"],
)
def test_tokens_that_end_an_answer(tokens: dict[int, str], ends: set[int], gguf_bytes: bytes, tmp_path: Path) -> None:
    """With gpt-oss <|end|> ends one message of an answer only."""
    file = gguf_file(tmp_path, gguf_bytes)
    for index, token in tokens.items():
        file.metadata["tokenizer.ggml.tokens"][index] = token
        file.metadata["tokenizer.ggml.token_type"][index] = 3
    assert set(spec_from_gguf(file).eos_token_ids) == ends


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, {}, (1, (2,))),
        ({"bos_token_id": 3, "eos_token_id": 4}, {}, (3, (4,))),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token_id": 5, "eos_token_id": [6, 7]}, (5, (6, 7))),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token_id": None, "eos_token_id": None}, (3, (4,))),
        ({"bos_token_id": None}, {}, (None, (2,))),
    ],
)
def test_which_file_names_the_first_and_last_tokens(
    config: dict[str, Any], generation: dict[str, Any], expected: tuple[int | None, tuple[int, ...]]
) -> None:
    """Mistral's configuration class has them where no file does."""
    given = {key: value for key, value in tiny_config("mistral").items() if not key.endswith("_token_id")}
    spec = spec_from_config(given | config, generation)
    assert (spec.bos_token_id, spec.eos_token_ids) == expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_default_tokens_are_those_of_transformers(family: Family) -> None:
    theirs = AutoConfig.for_model(family.model_type)
    defaults = ConfigKeys(family.defaults)
    assert defaults.optional("bos_token_id", int) == theirs.bos_token_id
    assert defaults.optional("eos_token_id", int) == theirs.eos_token_id


@pytest.mark.parametrize(
    ("entries", "factors"),
    [
        ({"scaling.factor": 4.0}, (4.0,) * 8),
        ({"scale_linear": 4.0}, (4.0,) * 8),
        ({"scaling.type": "linear", "scaling.factor": 4.0, "scale_linear": 2.0}, (4.0,) * 8),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.factor": 1.0}, None),
        ({"scaling.factor": 0.0}, None),
    ],
)
def test_positions_of_gguf_files_are_scaled_linearly_by_default(
    entries: dict[str, Any], factors: tuple[float, ...] | None, gguf_bytes: bytes, tmp_path: Path
) -> None:
    """As in llama.cpp."""
    file = gguf_file(tmp_path, gguf_bytes)
    file.metadata.update({f"llama.rope.{key}": value for key, value in entries.items()})
    assert spec_from_gguf(file).rope.factors == factors


@pytest.mark.parametrize("keys", [["attention.key_length", "attention.value_length"], ["rope.dimension_count"]])
def test_absurd_sizes_of_a_gguf_file_are_refused(keys: list[str], gguf_bytes: bytes, tmp_path: Path) -> None:
    """Before there is a table of them."""
    file = gguf_file(tmp_path, gguf_bytes)
    file.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file.metadata |= {f"llama.{key}": HUGE for key in keys}
    with pytest.raises(ModelError, match=r"must be 1 to 1048576|must be at most 1048576"):
        spec_from_gguf(file)


def test_a_gguf_file_without_a_first_token_has_none(gguf_bytes: bytes, tmp_path: Path) -> None:
    file = gguf_file(tmp_path, gguf_bytes)
    del file.metadata["tokenizer.ggml.bos_token_id"]
    assert spec_from_gguf(file).bos_token_id is None


@pytest.mark.parametrize("kind", ["eot", "eom"])
def test_tokens_that_a_gguf_file_says_end_an_answer(kind: str, gguf_bytes: bytes, tmp_path: Path) -> None:
    file = gguf_file(tmp_path, gguf_bytes)
    file.metadata[f"tokenizer.ggml.{kind}_token_id"] = 9
    assert set(spec_from_gguf(file).eos_token_ids) == {2, 0, 9}


def test_sound_files_are_accepted(directory: Path, gguf_bytes: bytes, tmp_path: Path) -> None:
    check_sound(validate_model_files(ModelFiles("tiny", directory, "safetensors")))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes)
    check_sound(validate_model_files(ModelFiles("tiny", path, "gguf")))


def test_truncated_gguf_is_refused(gguf_bytes: bytes, tmp_path: Path) -> None:
    message = refusal(tmp_path / "cut.gguf", gguf_bytes[:-1000])
    assert "truncated: tensor" in message


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gguf_cut_anywhere_is_refused(data: st.DataObject, gguf_bytes: bytes, tmp_path: Path) -> None:
    length = data.draw(st.integers(0, len(gguf_bytes) - 1000))
    refusal(tmp_path / "cut.gguf", gguf_bytes[:length])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupt_gguf_header_is_refused_or_harmless(data: st.DataObject, gguf_bytes: bytes, tmp_path: Path) -> None:
    """Whatever bytes of the header change: a ``ModelError`` or a model, never another exception or a hang."""
    header_end = gguf_bytes.index(b"blk.2.ffn_up.weight") + 60
    start = data.draw(st.integers(0, header_end))
    noise = data.draw(st.binary(min_size=1, max_size=12))
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(gguf_bytes[:start] + noise + gguf_bytes[start + len(noise) :])
    with contextlib.suppress(ModelError):
        Tokenizer.from_files(ModelFiles("corrupt", path, "gguf"))  # validates the file, too


def test_files_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    assert "not a GGUF file" in refusal(tmp_path / "text.gguf", b"This is no model." * 10)
    assert "cannot be read" in refusal(tmp_path / "empty.gguf", b"")
    assert "version 1" in refusal(tmp_path / "old.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0))


def test_unsupported_gguf_architecture_is_named(gguf_bytes: bytes, tmp_path: Path) -> None:
    message = refusal(tmp_path / "other.gguf", gguf_bytes.replace(b"llama", b"mamba"))
    assert "architecture 'mamba' is not supported (supported: llama, qwen2, qwen3, qwen3moe, " in message


def test_unsupported_gguf_tensor_type_is_named(gguf_bytes: bytes, tmp_path: Path) -> None:
    name = b"blk.1.attn_q.weight"
    at = gguf_bytes.index(name) + len(name) + 4 + 2 * 8  # after the name: number of dimensions, two dimensions
    assert struct.unpack_from("<I", gguf_bytes, at)[0] == GGMLQuantizationType.Q4_0
    for kind, reason in ((GGMLQuantizationType.I8, "unsupported type I8"), (9999, "unknown type 9999")):
        content = gguf_bytes[:at] + struct.pack("<I", kind) + gguf_bytes[at + 4 :]
        message = refusal(tmp_path / "typed.gguf", content)
        assert "'blk.1.attn_q.weight'" in message
        assert reason in message


def test_missing_gguf_tensor_is_named(gguf_bytes: bytes, tmp_path: Path) -> None:
    message = refusal(tmp_path / "lacking.gguf", gguf_bytes.replace(b"blk.1.attn_q.weight", b"blk.1.other.weight_"))
    assert "'blk.1.attn_q.weight' is missing" in message


def test_gguf_tensor_of_an_unsupported_feature_is_named(directory: Path, tmp_path: Path) -> None:
    """Query norms would be ignored silently, and the model would babble."""
    files = make_gguf(tmp_path / "tiny.gguf", directory, extra_tensor="blk.0.attn_q_norm.weight")
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_q_norm\.weight' belongs to a feature"):
        validate_model_files(files)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported (supported: llama, qwen2, qwen3, qwen3_moe, "),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -4.0}}, "rope scaling: factor is -4.0, must be positive"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor is None, must be a list"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5, must be more than 1"),
        ({"partial_rotary_factor": 0.1}, "1 dimensions turn, must be a positive even number"),
        ({"quantization_config": {"quant_method": "quip"}}, "not supported: quant_method = 'quip' (supported: awq, "),
        ({"attention_bias": True}, "not supported: attention_bias"),
        ({"use_sliding_window": True}, "not supported: use_sliding_window"),
        ({"hidden_act": "gelu"}, "not supported: hidden_act"),
        ({"head_dim": HUGE, "rope_scaling": LINEAR}, f"head_dim is {HUGE}, must be 1 to 1048576"),
        ({"partial_rotary_factor": 1e12, "rope_scaling": LINEAR}, f"{16 * 10**12} dimensions turn, must be at most"),
        ({"hidden_size": HUGE, "head_dim": None, "rope_scaling": LINEAR}, f"hidden_size is {HUGE}, must be 1 to"),
        ({"num_attention_heads": HUGE}, f"num_attention_heads is {HUGE}, must be 1 to 1048576"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1, must be 1 to 1048576"),
        ({"vocab_size": HUGE}, f"vocab_size is {HUGE}, must be 1 to 1048576"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"hidden_size": "64"}, "hidden_size is '64', must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be 1 to 1024"),
        ({"model_type": "qwen3_moe", "num_experts": 1024, "num_hidden_layers": 1024}, "1024 layers of 1024 experts"),
        ({"num_hidden_layers": 4}, "'model.layers.3.input_layernorm.weight' is missing"),
        ({"intermediate_size": 256}, "has the shape"),
        ({"eos_token_id": "two"}, None),
    ],
)
def test_unsupported_configuration_is_named(changes: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    files = make_directory(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError) as refused:
        validate_model_files(files)
    assert str(tmp_path) in str(refused.value)
    assert (reason or "eos_token_id is 'two'") in str(refused.value)


def test_truncated_safetensors_is_refused(tmp_path: Path) -> None:
    files = make_directory(tmp_path)
    weights = tmp_path / "model.safetensors"
    for content in (weights.read_bytes()[:-10], weights.read_bytes()[:100], b""):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors: corrupt or truncated"):
            validate_model_files(files)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    files = make_directory(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        validate_model_files(files)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"a":' + "[" * 200_000 + "]" * 200_000 + "}"])
def test_unreadable_config_is_refused(content: str | None, tmp_path: Path) -> None:
    files = make_directory(tmp_path)
    path = tmp_path / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: (cannot be read|must hold a JSON object)"):
        validate_model_files(files)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_of_any_depth_is_refused_or_read(name: str, tmp_path: Path) -> None:
    """Just below the depth that Python can parse it cannot be shown."""
    files, given = make_directory(tmp_path), json.loads((tmp_path / name).read_text())
    for key in ("eos_token_id", "bos_token", "chat_template"):
        for depth in (50, *range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10)):
            text = json.dumps(given | {key: "@"}).replace('"@"', "[" * depth + "]" * depth)
            (tmp_path / name).write_text(text)
            with contextlib.suppress(ModelError):
                validate_model_files(files)
                Tokenizer.from_files(files)
