"""Every family of models against ``transformers``: logits, and greedy text by whole engines with drafts.

Tiny random models. Logits within 3e-5 in float32, and in bfloat16 not further from float32 than those of transformers
are; 64 tokens, the same ones, in a batch with chunked prompts, prefixes from the cache and preemption, all of it with a
random EAGLE-3 draft and a dynamic vocabulary. The compiled CPU kernels are compared with plain torch.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evospec.adapters.target_parts import load_target_parts
from evospec.engine.config import MAX_SPECULATIVE_TOKENS, ModelConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelError
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.families.known import FAMILIES as KNOWN
from evospec.engine.models.families.known import spec_from_config
from evospec.engine.models.native_decoder import unsupported_shape
from evospec.engine.models.registry import validate_model_files
from evospec.kernels import native
from evospec.kernels.between_products import rms_norm
from evospec.kernels.native import Team
from tests.any_json import JSON
from tests.native_models import check_model, hidden_by_position, random_tokens
from tests.reference_logits import check_greedy, check_logits, load, logits_of, transformers_model
from tests.tiny_drafts import Engine, Setting, with_draft
from tests.tiny_families import FAMILIES, WINDOW, TinyFamily
from tests.tiny_models import make_gguf, tiny_config

NUM_TOKENS = 64
SETTINGS = {
    "chunks": Setting(prefix_caching=True, max_batched_tokens=20),
    "preemption": Setting(num_blocks=14),
}
FOR_KERNELS: dict[str, Any] = {"hidden_size": 128, "head_dim": 64}
"""The compiled kernels want multiples of 32, of dimensions that turn as well."""
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
as_gguf = pytest.mark.parametrize(
    "family", [family for family in FAMILIES.values() if family.has_gguf],
    ids=[name for name, family in FAMILIES.items() if family.has_gguf],
)  # fmt: skip
needs_kernels = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))


def for_kernels(family: TinyFamily) -> dict[str, Any]:
    """What its configuration needs so that the kernels take it."""
    scaling = family.config.get("rope_scaling", {})
    factors = {key: scaling[key] * 4 for key in ("short_factor", "long_factor") if key in scaling}
    return FOR_KERNELS | ({"rope_scaling": scaling | factors} if factors else {})


def test_there_is_a_model_of_every_family() -> None:
    tested = {family.model_type for family in FAMILIES.values()}
    assert tested == {family.model_type for family in KNOWN}


@given(data=st.data())
def test_whatever_a_configuration_says_is_read_or_refused(data: st.DataObject) -> None:
    """One entry of it is anything at all."""
    family = data.draw(st.sampled_from(list(FAMILIES.values())))
    config = tiny_config(family.model_type, **family.config)
    key = data.draw(st.sampled_from(sorted(config)))
    scaling = {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "longrope", "su"]), "type": JSON}
    numbers = dict.fromkeys(["factor", "original_max_position_embeddings", "beta_fast", "mscale", "rope_theta"], JSON)
    config[key] = data.draw(JSON | st.fixed_dictionaries({}, optional=scaling | numbers))
    with contextlib.suppress(ModelError):
        spec_from_config(config, {}).tensor_shapes()


@every_family
def test_logits_agree_with_transformers(family: TinyFamily, tmp_path: Path) -> None:
    files = family.make(tmp_path)
    check_logits(files, transformers_model(files), random_tokens(100), atol=3e-5)


@as_gguf
def test_gguf_files_say_the_same(family: TinyFamily, tmp_path: Path) -> None:
    directory = family.make(tmp_path / "model")
    stored = make_gguf(tmp_path / "model.gguf", directory.path)
    expected = logits_of(load(directory), random_tokens(100))
    torch.testing.assert_close(logits_of(load(stored), random_tokens(100)), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_reads_images_too(prefix: str, tmp_path: Path) -> None:
    alone = FAMILIES["gemma3"].make(tmp_path / "alone")
    whole = FAMILIES["gemma3"].make(tmp_path / "whole")
    path, weights = tmp_path / "whole" / "config.json", tmp_path / "whole" / "model.safetensors"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": config, "eos_token_id": [1, 2]}))
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors | {"vision_tower.embeddings.weight": torch.zeros(3)}, weights)
    assert torch.equal(logits_of(load(whole), random_tokens(40)), logits_of(load(alone), random_tokens(40)))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokens = random_tokens(90)
    return [tokens, tokens[:40], tokens[:16], tokens[7:8]]


@pytest.fixture(scope="module")
def sampling(prompts: list[list[int]]) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)] * len(prompts)


@pytest.mark.parametrize("setting", SETTINGS)
@every_family
def test_greedy_text_is_that_of_transformers(
    family: TinyFamily, setting: str, prompts: list[list[int]], sampling: list[SamplingParams], tmp_path: Path
) -> None:
    files = family.make(tmp_path / "model")
    engine = Engine(files, SETTINGS[setting], with_draft(files, tmp_path / "draft"))
    outputs = engine.generate(prompts, sampling)
    check_greedy(transformers_model(files), prompts, outputs, NUM_TOKENS)
    assert engine.num_drafted > 0
    assert (engine.core.stats().preemptions > 0) == (setting == "preemption")
    if setting == "chunks":
        assert engine.generate(prompts, sampling) == outputs
        assert engine.num_cached_tokens > len(prompts) * 16


def test_blocks_before_every_layers_window_are_given_to_others(
    prompts: list[list[int]], sampling: list[SamplingParams], tmp_path: Path
) -> None:
    """There is no room for all tokens at once, and yet nobody is preempted; copies are drafted."""
    preemptions = []
    for window in (WINDOW, 200):
        files = FAMILIES["mistral, sliding"].make(tmp_path / str(window), sliding_window=window)
        engine = Engine(files, Setting(True, num_blocks=14), SpeculationConfig(method="ngram", adaptive=False))
        outputs = engine.generate(prompts, sampling)
        check_greedy(transformers_model(files), prompts, outputs, NUM_TOKENS)
        assert engine.generate(prompts, sampling) == outputs
        preemptions.append(engine.core.stats().preemptions)
        assert engine.num_drafted > 0
    assert preemptions[0] == 0 < preemptions[1]


@needs_kernels
def test_the_compiled_kernels_read_nothing_before_the_window(
    prompts: list[list[int]], sampling: list[SamplingParams], tmp_path: Path
) -> None:
    family = FAMILIES["mistral, sliding"]
    files = family.make(tmp_path / "model", **for_kernels(family))
    few, many = (Engine(files, Setting(True, num_blocks=count), dtype="auto") for count in (14, 128))
    assert few.generate(prompts, sampling) == many.generate(prompts, sampling)
    assert few.core.stats().preemptions == 0


@every_family
def test_a_draft_is_trained_with_what_it_is_served_with(family: TinyFamily, tmp_path: Path) -> None:
    files = family.make(tmp_path)
    spec, model, tokens = validate_model_files(files), load(files), torch.tensor(random_tokens(20))
    length = ModelConfig(name=str(files.path)).longest_sequence(spec)
    parts = load_target_parts(files, spec, dtype=torch.float32)
    assert torch.equal(parts.embed(tokens), model.embed(tokens))
    assert torch.equal(parts.head_input(model.embed(tokens)), rms_norm(model.embed(tokens), model.norm, 1e-5))
    served = RotaryEmbedding(spec.rope, length, torch.device("cpu"))
    assert len(parts.rotary.cos_sin) >= length + MAX_SPECULATIVE_TOKENS
    assert torch.equal(parts.rotary.cos_sin[:length], served.cos_sin)


@needs_kernels
@every_family
def test_compiled_kernels_are_as_near_as_torch(family: TinyFamily, tmp_path: Path) -> None:
    files = family.make(tmp_path, **for_kernels(family))
    assert unsupported_shape(validate_model_files(files)) is None
    check_model(files, random_tokens(100), [Team(2)])


@needs_kernels
@every_family
def test_drafts_change_nothing_on_the_compiled_kernels(
    family: TinyFamily, prompts: list[list[int]], sampling: list[SamplingParams], tmp_path: Path
) -> None:
    """In bf16, alone: steps of up to 8 tokens multiply each row as if it were alone."""
    files = family.make(tmp_path / "model", **for_kernels(family))
    speculation = with_draft(files, tmp_path / "draft")
    engine = Engine(files, Setting(max_num_seqs=1), speculation, dtype="auto")
    plain = Engine(files, Setting(max_num_seqs=1), dtype="auto")
    assert engine.generate_alone(prompts, sampling) == plain.generate_alone(prompts, sampling)
    assert engine.num_drafted > 0


@needs_kernels
@as_gguf
def test_a_token_is_the_same_in_any_step_of_the_kernels(family: TinyFamily, tmp_path: Path) -> None:
    """Bit for bit, so no batch and no draft changes a rounding."""
    directory = family.make(tmp_path / "model", **for_kernels(family))
    files = make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType.Q4_1)
    team = Team(2)
    at_once = hidden_by_position(files, team, [[60, 45]], 64)
    assert torch.equal(hidden_by_position(files, team, [[31, 0], [29, 40], [0, 5]], 64), at_once)
    assert torch.equal(hidden_by_position(files, team, [[1, 1]] * 45 + [[1, 0]] * 15, 64), at_once)
