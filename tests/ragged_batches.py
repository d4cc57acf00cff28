"""Random ragged batches for attention backends: sequences that grow step by step, with scattered blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from evospec.engine.attention.base import AttentionBackend, AttentionSpec
from evospec.engine.batch import ForwardBatch


class RaggedSequences:
    """B sequences of up to ``max_len`` tokens each; block ids are dealt in random order."""

    def __init__(self, num_sequences: int, max_len: int, block_size: int, seed: int = 0) -> None:
        self.block_size = block_size
        blocks_each = -(-max_len // block_size)
        self.num_blocks = num_sequences * blocks_each
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(seed))
        self._tables = order.reshape(num_sequences, blocks_each)
        self._num_computed = [0] * num_sequences

    def step(self, num_tokens: Sequence[int], device: torch.device | None = None) -> ForwardBatch:
        """The next ``num_tokens[b]`` tokens of each sequence b; those with 0 sit the step out."""
        chosen = [b for b, count in enumerate(num_tokens) if count]
        counts = torch.tensor([num_tokens[b] for b in chosen])
        starts = torch.tensor([self._num_computed[b] for b in chosen])
        for b in chosen:
            self._num_computed[b] += num_tokens[b]
        row = torch.repeat_interleave(counts)
        query_start_loc = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        positions = starts[row] + torch.arange(len(row)) - query_start_loc[row]
        tables = self._tables[chosen]
        num_used = -(-(starts + counts) // self.block_size)
        tables = tables * (torch.arange(tables.shape[1]) < num_used[:, None])
        slots = tables[row, positions // self.block_size] * self.block_size + positions % self.block_size

        def int32(field: torch.Tensor) -> torch.Tensor:
            return field.to(device, torch.int32).contiguous()

        return ForwardBatch(
            token_ids=int32(torch.zeros(len(row))),
            positions=int32(positions),
            query_start_loc=int32(query_start_loc),
            seq_lens=int32(starts + counts),
            block_tables=int32(tables),
            slot_mapping=int32(slots),
            logits_indices=torch.empty(0, dtype=torch.int64, device=device),
        )


def attention_spec(
    heads: tuple[int, int],
    head_dim: int,
    sequences: RaggedSequences,
    dtype: torch.dtype,
    device: torch.device,
    num_layers: int = 2,
) -> AttentionSpec:
    """``heads``: query heads, KV heads."""
    return AttentionSpec(num_layers, *heads, head_dim, sequences.num_blocks, sequences.block_size, dtype, device)


def compare_backends(
    backends: Sequence[AttentionBackend],
    reference: AttentionBackend,
    sequences: RaggedSequences,
    steps: Sequence[Sequence[int]],
    seed: int = 0,
    sinks: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Runs all of them on the same random bf16 numbers.

    Yields (output, reference) as float32 for each step, layer and backend. The backends have one ``AttentionSpec``.
    """
    spec, generator = backends[0].spec, torch.Generator().manual_seed(seed)
    for counts in steps:
        batch = sequences.step(counts, spec.device)
        for each in (*backends, reference):
            each.plan(batch)
        for layer in range(spec.num_layers):
            q, k, v = (
                torch.randn(len(batch.token_ids), heads, spec.head_dim, generator=generator).bfloat16().to(spec.device)
                for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
            )
            expected = _attended(reference, layer, (q, k, v), sinks)
            for backend in backends:
                yield _attended(backend, layer, (q, k, v), sinks), expected


def _attended(
    backend: AttentionBackend,
    layer: int,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    q, k, v = (x.to(backend.spec.dtype) for x in qkv)
    return backend.forward(layer, q, k, v, sinks).float()


def largest_row_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error against that of the output, of the query and head [head_dim] where it is worst.

    One key too many or too few, of 500, is about 0.02 at the median query and more at some: to be seen here, while
    against a bound on single numbers it would not be.
    """
    assert output.shape == expected.shape
    error, size = ((x.square().mean(-1)).sqrt() for x in (output - expected, expected))
    return float((error / size).max())
