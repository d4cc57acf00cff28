"""The EAGLE-3 layer on the compiled kernels against the torch module with torch's paged attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention.native_cpu import NativeAttention
from engine.attention.torch_paged import TorchPagedAttention
from engine.models.eagle3 import Eagle3, Eagle3Config
from engine.models.llama import RotaryEmbedding
from engine.models.native_eagle3 import NativeEagle3
from engine.models.registry import validate_model_files
from kernels import native
from tests.ragged_batches import RaggedSequences, attention_spec
from tests.tiny_models import make_directory

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))

CPU = torch.device("cpu")
TOLERANCE = 2e-2
"""Root mean square of the error against that of the output: 8-bit weights (4e-3 each), bf16 activations."""


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("steps", [[[20, 1, 40]], [[20, 1, 40], [1, 1, 1], [3, 0, 1]]])
def test_same_as_the_torch_module(steps: list[list[int]], tmp_path: Path) -> None:
    spec = validate_model_files(make_directory(tmp_path / "model", hidden_size=128, head_dim=32))
    torch.manual_seed(0)
    draft = Eagle3(Eagle3Config.for_target(spec, "tiny", (0, 1, 2), intermediate_size=192)).requires_grad_(False)
    for norm in (draft.embedding_norm, draft.hidden_norm, draft.post_attention_norm, draft.output_norm):
        norm.uniform_(0.5, 1.5)
    sequences = RaggedSequences(3, 64, 16)
    heads = (spec.num_heads, spec.num_kv_heads)
    team = native.Team(2)
    ours = NativeEagle3(draft, spec, team, 64)
    assert ours.weight_bytes < 2 * sum(weight.numel() for weight in draft.parameters())
    attention = NativeAttention(attention_spec(heads, spec.head_dim, sequences, torch.bfloat16, CPU), team)
    reference = TorchPagedAttention(attention_spec(heads, spec.head_dim, sequences, torch.float32, CPU))
    rotary = RotaryEmbedding(spec, 64, CPU)
    for counts in steps:
        batch = sequences.step(counts)
        tokens = len(batch.positions)
        embeddings, features = torch.randn(tokens, 128), torch.randn(tokens, 3 * 128)
        g = draft.fuse(features)
        q, k, v = draft.qkv(embeddings, g)
        reference.plan(batch)
        q, k = rotary(q, batch.positions), rotary(k, batch.positions)
        expected = draft.output(g, reference.forward(0, q, k, v))
        assert relative_error(ours.fuse(features), g) < TOLERANCE
        output = ours.forward(batch, attention, embeddings, g)
        assert relative_error(output - g, expected - g) < TOLERANCE
        assert relative_error(ours.head_input(output), draft.head_input(expected)) < TOLERANCE
