"""Whole models on the compiled CPU kernels: how near they are to float32, and whether steps change their bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from msgspec import structs

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.models.config import ModelFiles, ModelSpec
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.native_decoder import NativeDecoder
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.kernels.native import Team
from tests.ragged_batches import RaggedSequences, attention_spec
from tests.tiny_models import VOCAB_SIZE

CPU = torch.device("cpu")


def cache_spec(spec: ModelSpec, sequences: RaggedSequences, dtype: torch.dtype) -> AttentionSpec:
    """Of a whole model's attention."""
    shape = attention_spec((spec.num_heads, spec.num_kv_heads), spec.head_dim, sequences, dtype, CPU, spec.num_layers)
    return replace(shape, scale=spec.attention_scale, windows=spec.windows)


def check_model(files: ModelFiles, token_ids: list[int], teams: Sequence[Team]) -> None:
    """Logits are not further from float32 than plain bf16 torch is; prefill, then tokens one by one and in pieces."""
    spec, source = validate_model_files(files), open_weights(files)
    sequences = RaggedSequences(1, len(token_ids), 16)
    exact = load_model(source, spec, torch.float32, CPU)
    narrow = load_model(source, spec, torch.bfloat16, CPU)
    runs: list[tuple[TorchDecoder | NativeDecoder, AttentionBackend]] = [
        (exact, TorchPagedAttention(cache_spec(spec, sequences, torch.float32))),
        (narrow, TorchPagedAttention(cache_spec(spec, sequences, torch.bfloat16))),
    ]
    for team in teams:
        ours = NativeDecoder(source, spec, team, len(token_ids))
        runs.append((ours, NativeAttention(cache_spec(spec, sequences, torch.bfloat16), team)))
    logits: list[list[torch.Tensor]] = [[] for _ in runs]
    first = len(token_ids) - 13
    begin = 0
    for count in (first, 1, 1, 1, 2, 3, 5):
        batch = sequences.step([count])
        batch.token_ids.copy_(torch.tensor(token_ids[begin : begin + count]))
        begin += count
        for (model, attention), rows in zip(runs, logits, strict=True):
            rows.append(model.compute_logits(model.forward(batch, attention).hidden).clone())
    expected, rounded, *outputs = (torch.cat(rows) for rows in logits)
    assert len(expected) == len(token_ids)
    theirs = (rounded - expected).abs().mean()
    assert theirs > 0
    for output in outputs:
        assert output.shape == expected.shape
        assert (output - expected).abs().mean() < theirs


def random_tokens(count: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def hidden_by_position(
    files: ModelFiles, team: Team, steps: list[list[int]], prompt: int, digits: int = 1
) -> torch.Tensor:
    """Of two sequences in these steps, in order of sequence and position.

    Args:
        prompt: tokens of each sequence's prompt.
        digits: of activations.
    """
    spec, source = validate_model_files(files), open_weights(files)
    sequences, tokens = RaggedSequences(2, 64, 16), torch.tensor([random_tokens(64), random_tokens(64)[::-1]])
    model = NativeDecoder(source, spec, team, 64, digits)
    attention, rows = NativeAttention(cache_spec(spec, sequences, torch.bfloat16), team), {}
    for counts in steps:
        batch = sequences.step(counts)
        owners = torch.repeat_interleave(torch.tensor([i for i in (0, 1) if counts[i]]), batch.query_start_loc.diff())
        batch.token_ids.copy_(tokens[owners, batch.positions])
        num_prefilling = int((batch.positions[batch.query_start_loc[:-1]] < prompt).sum())
        hidden = model.forward(structs.replace(batch, num_prefilling=num_prefilling), attention).hidden
        places = zip(owners.tolist(), batch.positions.tolist(), strict=True)
        rows.update({place: hidden[row].clone() for row, place in enumerate(places)})
    return torch.stack([rows[place] for place in sorted(rows)])
