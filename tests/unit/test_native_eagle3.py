"""The EAGLE-3 network on the compiled kernels against the one of torch operations."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf.quants import dequantize, quantize
from msgspec.structs import replace

from evospec.engine.adapters_config import LoraTarget
from evospec.engine.attention.base import AttentionBackend
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.batch import Features
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.lora import adapted_rows
from evospec.engine.models.native_eagle3 import WEIGHT_TYPE, NativeEagle3, unsupported_draft
from evospec.engine.models.registry import validate_model_files
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork, TorchEagleNetwork, make_network
from evospec.kernels import native
from evospec.kernels.batched_lora import LoraPart, LoraRows
from tests.ragged_batches import RaggedSequences, attention_spec
from tests.tiny_drafts import WEIGHTS, random_draft
from tests.tiny_models import make_directory

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))

CPU = torch.device("cpu")
TOLERANCE = 2e-2
"""Root mean square of the error against that of the output: bf16 activations. Weights are rounded on both sides."""


def rounded_draft(files: ModelFiles) -> Eagle3:
    """Whose weights are such that the compiled kernels have them as they are."""
    draft = random_draft(files)
    for weight in draft.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.from_numpy(dequantize(quantize(weight.numpy(), WEIGHT_TYPE), WEIGHT_TYPE)))
    return draft


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return float((output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
@pytest.mark.parametrize("steps", [[[20, 1, 40]], [[20, 1, 40], [1, 1, 1], [3, 0, 1]]])
@pytest.mark.parametrize("num_wanted", [(1, 1, 1), (1, 0, 2), (0, 0, 0)])
def test_same_as_the_torch_network(
    num_wanted: tuple[int, ...], steps: list[list[int]], architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The last so many rows of each sequence are wanted, and then the last: keys and values of all must be there."""
    files = make_directory(tmp_path / "model", architecture, hidden_size=128, head_dim=32)
    spec, draft = validate_model_files(files), rounded_draft(files)
    sequences = RaggedSequences(3, 64, 16)
    heads = (spec.num_heads, spec.num_kv_heads)
    team = native.Team(2)
    ours = NativeEagle3(draft, spec, team, 64)
    assert ours.weight_bytes < 2 * sum(weight.numel() for weight in draft.parameters())
    reference = TorchEagleNetwork(draft.to(dtype), RotaryEmbedding(spec.rope, 64, CPU))
    native_kv = NativeAttention(attention_spec(heads, spec.head_dim, sequences, torch.bfloat16, CPU, 1), team)
    torch_kv = TorchPagedAttention(attention_spec(heads, spec.head_dim, sequences, dtype, CPU, 1))
    for counts in steps:
        batch = sequences.step(counts)
        ends = list(accumulate(counts))
        most = num_wanted if counts is steps[0] else (1, 1, 1)
        last = [range(end - min(few, count), end) for end, count, few in zip(ends, counts, most, strict=True)]
        wanted = torch.tensor([row for rows in last for row in rows], dtype=torch.int64)
        batch = replace(batch, logits_indices=wanted)
        tokens = len(batch.positions)
        embeddings, features = torch.randn(tokens, 128).to(dtype), torch.randn(tokens, 3 * 128)
        g = reference.fuse(features)
        assert relative_error(ours.fuse(features), g) < TOLERANCE
        stores = torch.zeros(2, 16 * sequences.num_blocks, 128, dtype=torch.bfloat16)
        networks: tuple[EagleNetwork, ...] = (ours, reference)
        for network, store in zip(networks, stores, strict=True):
            network.fuse_into(store, Features(features, batch.slot_mapping))
        assert relative_error(stores[0], stores[1].float()) < TOLERANCE
        expected = reference.forward(batch, torch_kv, embeddings, g)
        output = ours.forward(batch, native_kv, embeddings, g)
        assert len(output) == len(wanted)
        if len(wanted) == 0:
            continue
        assert relative_error(output - g[wanted], expected - g[wanted]) < TOLERANCE
        assert relative_error(ours.head_input(output), reference.head_input(expected)) < TOLERANCE


def random_adapters(draft: Eagle3, num_slots: int, targets: Sequence[LoraTarget]) -> list[LoraPart]:
    """Of rank 8, about as large as the weights."""
    parts = []
    for target in targets:
        rows = adapted_rows(draft.config, target)
        a = torch.randn(num_slots, 8, rows.num_inputs) / rows.num_inputs**0.5
        b = torch.randn(num_slots, 8, rows.end - rows.start) / 8**0.5
        parts.append(LoraPart(rows.start, rows.end, a.bfloat16(), b.bfloat16(), rows.matrix))
    return parts


def with_merged_weights(draft: Eagle3, parts: list[LoraPart], slot: int) -> Eagle3:
    merged = deepcopy(draft)
    for part in parts:
        gain = part.b[slot].float().T @ part.a[slot].float()
        merged.get_parameter(WEIGHTS[part.matrix])[part.start : part.end] += gain
    return merged


@pytest.mark.parametrize("targets", [("q", "v", "o", "down"), ("q", "k", "v"), ("o",), ("k", "down")])
@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_each_sequence_has_its_own_adapter(kind: str, targets: Sequence[LoraTarget], tmp_path: Path) -> None:
    """Four sequences in a batch, three of them with adapters: each is as if alone with merged weights."""
    files = make_directory(tmp_path / "model", hidden_size=128, head_dim=32)
    spec, draft = validate_model_files(files), rounded_draft(files)
    rotary = RotaryEmbedding(spec.rope, 64, CPU)
    parts, of_sequence = random_adapters(draft, 3, targets), [1, -1, 2, 0]
    sequences, heads = RaggedSequences(4, 64, 16), (spec.num_heads, spec.num_kv_heads)

    def torch_attention() -> TorchPagedAttention:
        return TorchPagedAttention(attention_spec(heads, spec.head_dim, sequences, torch.float32, CPU, 1))

    team = native.Team(2)
    drafts = [draft if slot < 0 else with_merged_weights(draft, parts, slot) for slot in of_sequence]
    expecting = [(TorchEagleNetwork(one, rotary), torch_attention()) for one in drafts]
    network: EagleNetwork = TorchEagleNetwork(draft, rotary)
    attention: AttentionBackend = torch_attention()
    if kind == "compiled":
        network = NativeEagle3(draft, spec, team, 64)
        attention = NativeAttention(attention_spec(heads, spec.head_dim, sequences, torch.bfloat16, CPU, 1), team)
    for counts in ([20, 3, 1, 40], [1, 1, 1, 1]):
        batch = sequences.step(counts)
        batch = replace(batch, logits_indices=batch.query_start_loc[1:].long() - 1)
        embeddings, g = torch.randn(sum(counts), 128), torch.randn(sum(counts), 128)
        slots = torch.tensor(of_sequence, dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        output = network.forward(batch, attention, embeddings, g, LoraRows(slots, parts))
        for row, (alone, its_attention) in enumerate(expecting):
            expected = alone.forward(batch, its_attention, embeddings, g)[row]
            error = relative_error(output[row] - g[batch.logits_indices[row]], expected - g[batch.logits_indices[row]])
            assert error < (1e-4 if kind == "torch" else TOLERANCE)


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_other_weights_in_place_are_as_those_of_another_network(kind: str, tmp_path: Path) -> None:
    """Loaded, and the first ones loaded again: to the bit what a network made of them computes."""
    files = make_directory(tmp_path / "model", "qwen2", hidden_size=128, head_dim=32)
    spec, drafts = validate_model_files(files), [random_draft(files, seed) for seed in (0, 1)]
    weights = [{name: w.detach().clone() for name, w in draft.named_parameters()} for draft in drafts]
    heads, team = (spec.num_heads, spec.num_kv_heads), native.Team(2)
    sequences = RaggedSequences(3, 64, 16)
    batch = sequences.step([20, 1, 40])
    batch = replace(batch, logits_indices=batch.query_start_loc[1:].long() - 1)
    embeddings, features = torch.randn(61, 128), torch.randn(61, 3 * 128)

    def make(draft: Eagle3) -> EagleNetwork:
        if kind == "compiled":
            return NativeEagle3(draft, spec, team, 64)
        return TorchEagleNetwork(draft, RotaryEmbedding(spec.rope, 64, CPU))

    def compute(network: EagleNetwork) -> torch.Tensor:
        attention: AttentionBackend
        if kind == "compiled":
            attention = NativeAttention(attention_spec(heads, spec.head_dim, sequences, torch.bfloat16, CPU, 1), team)
        else:
            attention = TorchPagedAttention(attention_spec(heads, spec.head_dim, sequences, torch.float32, CPU, 1))
        return network.head_input(network.forward(batch, attention, embeddings, network.fuse(features)))

    expected = [compute(make(draft)) for draft in drafts]
    assert not torch.equal(*expected)
    network = make(drafts[0])
    for which in (1, 0):
        network.load(weights[which])
        assert torch.equal(compute(network), expected[which])


def test_a_width_that_the_kernels_cannot_run_is_named_and_run_by_torch(tmp_path: Path) -> None:
    spec = validate_model_files(make_directory(tmp_path / "model", hidden_size=128, head_dim=32))
    config = Eagle3Config.for_target(spec, "tiny", (0, 1, 2), intermediate_size=100)
    assert unsupported_draft(config) == "intermediate_size 100 is not a multiple of 32"
    target: Any = SimpleNamespace(team=native.Team(1), spec=spec, max_model_len=64, digits=2, device=CPU)
    assert isinstance(make_network(Eagle3(config).requires_grad_(False), target), TorchEagleNetwork)
