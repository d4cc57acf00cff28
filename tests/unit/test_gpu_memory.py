"""What an engine takes of a card, by arithmetic: weights, draft, steps, graphs and KV cache never exceed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evospec.engine import model_runner
from evospec.engine.config import EngineConfig, RuntimeConfig, SchedulerConfig, SpeculationConfig
from evospec.engine.gpu_memory import gpu_reserve
from evospec.engine.loader import LoadedModel
from evospec.engine.model_runner import attention_spec, num_kv_blocks
from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.families.known import spec_from_config
from tests.unit.scheduler_simulation import Simulation, make_request

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
COMMON = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
LIMITS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "eos_token_id": 2, "tie_word_embeddings": False}
DEFAULTS = SchedulerConfig()
SMALL_STEPS = SchedulerConfig(max_batched_tokens=1024, max_num_seqs=64)


def weight_bytes(spec: ModelSpec) -> int:
    """In bfloat16, and of an EAGLE-3 draft."""
    hidden, heads = spec.hidden_size, (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    layer = hidden * (heads + 3 * spec.intermediate_size)
    target = 2 * spec.vocab_size * hidden + spec.num_layers * layer
    return 2 * (target + 3 * hidden * hidden + 2 * layer)


@pytest.mark.parametrize("card", [24, 48, 80, 141])
@pytest.mark.parametrize("scheduler", [DEFAULTS, SMALL_STEPS], ids=["defaults", "small steps"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_card_is_never_over(
    shape: str, scheduler: SchedulerConfig, card: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, device = spec_from_config(COMMON | LIMITS | SHAPES[shape], {}), torch.device("cuda")
    config = EngineConfig(runtime=RuntimeConfig(device="cuda"), scheduler=scheduler.model_copy())
    free = card * GIB - weight_bytes(spec)
    monkeypatch.setattr(model_runner, "_free_memory", lambda _: max(free, 0))
    unused: Any = None
    loaded = LoadedModel(unused, spec, 8192, torch.bfloat16, device, "flashinfer", unused, cuda_graphs=True)
    reserved = sum(gpu_reserve(config, spec, 2, has_draft=True))
    # Entries of a draft's one layer, and what it stores of the target's.
    draft = config.cache.block_size * 2 * (2 * spec.num_kv_heads * spec.head_dim + spec.hidden_size)
    if shape == "70B" and (card < 141 or scheduler is DEFAULTS):
        with pytest.raises(ModelError, match="for the KV cache hold"):
            num_kv_blocks(loaded, config.cache, draft, reserved)
        return
    blocks = num_kv_blocks(loaded, config.cache, draft, reserved)
    per_block = attention_spec(loaded, config.cache, 1).bytes_per_block + draft
    assert weight_bytes(spec) + reserved + (blocks + 1) * per_block < card * GIB  # with the block that is nobody's
    assert blocks * config.cache.block_size >= 8192
    assert weight_bytes(spec) + reserved + blocks * per_block > 0.9 * card * GIB  # and hardly anything is left over


@pytest.mark.parametrize(("max_num_seqs", "num_drafts"), [(1, 32), (100, 32), (100, 2), (100, 0)])
def test_no_step_has_more_rows_of_logits_than_memory_is_kept_for(max_num_seqs: int, num_drafts: int) -> None:
    """Where all sequences have long copies, or prompts whose logits are wanted come at once."""
    simulation = Simulation(4000, max_num_seqs, 8192, max_model_len=1024, num_drafts=num_drafts, accuracy=1.0)
    for n in range(120):
        rows_of_prompt = 0 if n % 10 == 9 else None
        request = make_request(str(n), 200 if n % 10 == 9 else 4, 150, str(n % 3), rows_of_prompt)
        simulation.scheduler.add(request)
    outputs = simulation.run(max_steps=3000)
    most = max(sum(sequence.num_logits for sequence in output.sequences) for output in outputs)
    speculation = SpeculationConfig(num_speculative_tokens=min(num_drafts, 8), adaptive=num_drafts > 8)
    scheduler = SchedulerConfig(max_batched_tokens=8192, max_num_seqs=max_num_seqs)
    config = EngineConfig(runtime=RuntimeConfig(device="cuda"), scheduler=scheduler, speculation=speculation)
    spec = spec_from_config(COMMON | LIMITS | SHAPES["8B"], {})
    reserved = gpu_reserve(config, spec, 2, has_draft=num_drafts > 0).logits
    assert most * spec.vocab_size * (2 + 4 + 4) < reserved  # products, these in float32, and a copy


def test_more_tokens_and_sequences_reserve_more() -> None:
    spec = spec_from_config(COMMON | LIMITS | SHAPES["8B"], {})
    small, large = EngineConfig(runtime=RuntimeConfig(device="cpu")), EngineConfig(runtime=RuntimeConfig(device="cuda"))
    few, many = (gpu_reserve(config, spec, 2, has_draft=True) for config in (small, large))
    assert many.activations > 10 * few.activations
    assert many.logits > few.logits
    assert sum(gpu_reserve(large, spec, 2, has_draft=False)) < sum(many)
