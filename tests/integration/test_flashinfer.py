"""flashinfer's attention against plain torch, on a GPU; what leads up to it, anywhere."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from evospec.engine.attention.base import AttentionSpec
from evospec.engine.attention.flashinfer import FlashInferAttention, page_table, unsupported_reason
from evospec.engine.attention.torch_paged import TorchPagedAttention
from tests.emulated_flashinfer import DECODE, PREFILL, SIGNATURES
from tests.ragged_batches import RaggedSequences, attention_spec, compare_backends, largest_row_error

BLOCK_SIZE = 16
TOLERANCE = 1.5e-2
"""Of ``largest_row_error``: outputs and softmax weights are rounded to bf16 (relative 2^-9). The native kernels,
which round the same, reach 9e-3."""
STEPS = {
    "prefill": [[40, 1, 16, 33]],
    "decode": [[40, 17, 16, 600], [1, 1, 1, 1], [1, 1, 1, 1]],
    "mixed": [[40, 17, 0, 3], [1, 1, 90, 0], [1, 20, 1, 1]],
    "several tokens each": [[31, 5, 16, 700], [5, 5, 5, 5], [1, 7, 3, 2]],
}
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (14, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_agrees_with_torch(steps: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    sequences = RaggedSequences(4, 720, BLOCK_SIZE)
    backend = FlashInferAttention(attention_spec(heads, head_dim, sequences, dtype, device))
    reference = TorchPagedAttention(attention_spec(heads, head_dim, sequences, torch.float32, device))
    for output, expected in compare_backends([backend], reference, sequences, STEPS[steps]):
        assert largest_row_error(output, expected) < TOLERANCE


@gpu
@needs_cuda
@pytest.mark.parametrize("steps", STEPS)
def test_windows_scale_and_sinks_agree_with_torch(steps: str) -> None:
    device, sequences = torch.device("cuda"), RaggedSequences(4, 720, BLOCK_SIZE)

    def spec(dtype: torch.dtype) -> AttentionSpec:
        shape = attention_spec((9, 3), 64, sequences, dtype, device, num_layers=3)
        return replace(shape, scale=0.2, windows=(24, None, 100))

    backend, reference = FlashInferAttention(spec(torch.bfloat16)), TorchPagedAttention(spec(torch.float32))
    sinks = torch.randn(9, device=device)
    for output, expected in compare_backends([backend], reference, sequences, STEPS[steps], sinks=sinks):
        assert largest_row_error(output, expected) < TOLERANCE


@gpu
@needs_cuda
@pytest.mark.parametrize("wrapper", [PREFILL, DECODE])
def test_the_emulated_wrappers_have_its_signatures(wrapper: str) -> None:
    real = getattr(pytest.importorskip("flashinfer"), wrapper)
    for (name, method), emulated in SIGNATURES.items():
        if name == wrapper:
            parameters = inspect.signature(getattr(real, method)).parameters
            assert [one.name for one in parameters.values()] == list(emulated.parameters)


@pytest.mark.parametrize("steps", STEPS)
def test_page_table_lists_the_blocks_of_the_context(steps: str) -> None:
    """Every position of every context is found where the batch's block tables put it, and nothing more is listed."""
    sequences = RaggedSequences(4, 720, BLOCK_SIZE)
    for counts in STEPS[steps]:
        batch = sequences.step(counts)
        table = page_table(batch, BLOCK_SIZE)
        assert {t.dtype for t in (table.indptr, table.indices, table.last_page_len)} == {torch.int32}
        assert table.indptr[0] == 0
        assert table.indptr[-1] == len(table.indices)
        for row, seq_len in enumerate(batch.seq_lens.tolist()):
            pages = table.indices[table.indptr[row] : table.indptr[row + 1]].tolist()
            assert (len(pages) - 1) * BLOCK_SIZE + table.last_page_len[row] == seq_len
            assert 1 <= table.last_page_len[row] <= BLOCK_SIZE
            assert pages == batch.block_tables[row, : len(pages)].tolist()


def test_page_table_leaves_out_blocks_allocated_ahead() -> None:
    """Blocks for drafts that were not scheduled are in the block table, but hold no context."""
    batch = RaggedSequences(1, 64, BLOCK_SIZE).step([48])
    batch.seq_lens[0] = 17
    table = page_table(batch, BLOCK_SIZE)
    assert table.indices.tolist() == batch.block_tables[0, :2].tolist()
    assert table.last_page_len.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "not float32"),
        ({"head_dim": 80}, "head_dim is 80"),
        ({"num_heads": 10}, "10 query heads are not a multiple of 3"),
    ],
)
def test_what_it_has_no_kernel_for(changes: dict[str, object], reason: str) -> None:
    fields = {
        "num_layers": 1,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "num_blocks": 8,
        "block_size": BLOCK_SIZE,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda"),
    }
    spec = AttentionSpec(**(fields | changes))  # type: ignore[arg-type]
    assert reason in (unsupported_reason(spec) or "")
