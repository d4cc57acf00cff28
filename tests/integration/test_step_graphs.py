"""Steps padded to the sizes of graphs give what plain steps give; on a GPU, the graphs themselves do."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.attention.flashinfer import FlashInferAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.batch import FlatTokens, ForwardBatch, ForwardOutput
from evospec.engine.gpu_memory import GRAPH_SIZES
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.step_graphs import StepGraphs, padded
from tests.ragged_batches import RaggedSequences
from tests.tiny_models import make_directory

BLOCK_SIZE = 16
MAX_LEN = 160
STEPS = [[37, 0, 5, 1], [1, 90, 1, 1], [1, 1, 1, 1], [5, 2, 1, 3], [0, 1, 0, 0], [1, 5, 5, 5], [3, 0, 0, 2]]
"""Tokens of each of four sequences: prefill, decode, verification, and mixtures."""
LAYERS = (0, 2)
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class FixedTorchAttention(TorchPagedAttention):
    """Plans anew in the same object, as good as in the same memory where a step is computed anew."""

    def fixed(self, num_tokens: int, max_blocks: int) -> AttentionBackend:
        return self


def compute_anew(run: Callable[[], ForwardOutput]) -> tuple[Callable[[], None], ForwardOutput]:
    """What a recorder does, without a GPU: later changes of the function's inputs are seen, as by a graph."""
    first = run()
    assert first.features is not None
    output = ForwardOutput(torch.zeros_like(first.hidden), torch.zeros_like(first.features))

    def replay() -> None:
        again = run()
        assert output.features is not None
        assert again.features is not None
        output.hidden.copy_(again.hidden)
        output.features.copy_(again.features)

    return replay, output


def tiny_model(directory: Path, dtype: torch.dtype, device: torch.device, **overrides: Any) -> TorchDecoder:
    files = make_directory(directory, max_position_embeddings=1024, **overrides)
    return load_model(open_weights(files), validate_model_files(files), dtype, device)


def cache_spec(
    model: TorchDecoder, sequences: RaggedSequences, dtype: torch.dtype, device: torch.device
) -> AttentionSpec:
    """With a block more than the sequences have."""
    spec, blocks = model.spec, sequences.num_blocks + 1
    heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return AttentionSpec(spec.num_layers, *heads, blocks, sequences.block_size, dtype, device)


def with_tokens(batch: ForwardBatch, generator: torch.Generator, vocab_size: int) -> ForwardBatch:
    tokens = torch.randint(0, vocab_size, (len(batch.token_ids),), generator=generator, dtype=torch.int32)
    return replace(batch, token_ids=tokens.to(batch.token_ids.device))


def laid_out(batch: ForwardBatch) -> FlatTokens:
    """A batch as the lists that it could have been made of."""
    lists = {name: tensor.tolist() for name, tensor in batch.tensors.items()}
    block_ids = [array("i", blocks) for blocks in lists.pop("block_tables")]
    return FlatTokens(**lists, block_ids=block_ids)


def largest_difference(
    model: TorchDecoder, graphs: StepGraphs, plain: AttentionBackend, sequences: RaggedSequences
) -> float:
    """Over the outputs of all steps, which go round three times; relative to the largest number there is."""
    generator, worst = torch.Generator().manual_seed(3), 0.0
    for counts in STEPS * 3:
        batch = with_tokens(sequences.step(counts), generator, model.spec.vocab_size)
        ours, _ = graphs.forward(laid_out(batch), LAYERS)
        theirs = model.forward(batch.on(plain.spec.device), plain, LAYERS)
        assert ours.features is not None
        assert theirs.features is not None
        for one, other in ((ours.hidden, theirs.hidden), (ours.features, theirs.features)):
            assert one.shape == other.shape
            worst = max(worst, float((one - other).abs().max() / other.abs().max()))
    return worst


@torch.inference_mode()
def test_padded_steps_compute_what_plain_steps_do(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model, sequences = tiny_model(tmp_path, torch.float32, cpu), RaggedSequences(4, 3 * MAX_LEN, BLOCK_SIZE)
    spec = cache_spec(model, sequences, torch.float32, cpu)
    graphs = StepGraphs(model, FixedTorchAttention(spec), sequences.num_blocks, compute_anew)
    assert largest_difference(model, graphs, TorchPagedAttention(spec), sequences) < 1e-5


@pytest.mark.parametrize("counts", STEPS)
def test_padding_touches_nobodys_block(counts: list[int]) -> None:
    sequences = RaggedSequences(4, MAX_LEN, BLOCK_SIZE)
    batch, spare = sequences.step(counts), sequences.num_blocks
    size = next(size for size in GRAPH_SIZES if size >= len(batch.token_ids))
    more = padded(laid_out(batch), size, spare, BLOCK_SIZE)
    tokens, owners = len(batch.token_ids), len(batch.seq_lens)
    assert len(more.token_ids) == len(more.positions) == len(more.slot_mapping) == len(more.seq_lens) == size
    assert more.query_start_loc[-1] == size  # every plan of a graph has as many rows
    assert (more.query_start_loc.diff() >= 0).all()
    assert torch.equal(more.query_start_loc[: owners + 1], batch.query_start_loc)
    assert (more.slot_mapping[tokens:] // BLOCK_SIZE == spare).all()
    assert (more.block_tables[owners:] == spare).all()


def test_steps_too_large_for_a_graph_run_plainly(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model, sequences = tiny_model(tmp_path, torch.float32, cpu), RaggedSequences(2, 2 * GRAPH_SIZES[-1], BLOCK_SIZE)
    spec = cache_spec(model, sequences, torch.float32, cpu)

    def refuse(run: Callable[[], ForwardOutput]) -> tuple[Callable[[], None], ForwardOutput]:
        raise AssertionError("recorded")

    graphs = StepGraphs(model, FixedTorchAttention(spec), sequences.num_blocks, refuse)
    batch = sequences.step([128, 1 + GRAPH_SIZES[-1] - 128])
    assert len(graphs.forward(laid_out(batch), LAYERS)[0].hidden) == 1 + GRAPH_SIZES[-1]


@gpu
@needs_cuda
@torch.inference_mode()
def test_graphs_compute_what_plain_steps_do(tmp_path: Path) -> None:
    """bf16: rounding may differ where the kernels split a context otherwise."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    shape = {"hidden_size": 256, "head_dim": 64}
    model, sequences = tiny_model(tmp_path, dtype, device, **shape), RaggedSequences(4, 3 * MAX_LEN, BLOCK_SIZE)
    spec = cache_spec(model, sequences, dtype, device)
    graphs = StepGraphs(model, FlashInferAttention(spec), sequences.num_blocks)
    assert largest_difference(model, graphs, FlashInferAttention(spec), sequences) < 3e-2
