"""Runs the model over one scheduled step: flat tensors in, logits of the wanted rows out."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol

import torch

from evospec.engine.attention.base import AttentionSpec
from evospec.engine.batch import Features, FlatTokens, ForwardBatch, padded_block_tables
from evospec.engine.config import CacheConfig
from evospec.engine.gpu_memory import GRAPH_SIZES
from evospec.engine.loader import LoadedModel
from evospec.engine.machine import free_memory
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelError
from evospec.engine.prompt_embeddings import collect_embeddings
from evospec.engine.request import Request
from evospec.engine.sampling.choose import takes_largest_logit
from evospec.engine.step import ScheduledSequence
from evospec.engine.step_graphs import StepGraphs
from evospec.kernels.screened_head import MOST_ROWS

_CPU = torch.device("cpu")


class ModelRunner:
    """Owns the model and its attention backend (and so the KV cache).

    When the cache is sized, what a draft keeps for each block counts (``draft_bytes_per_block``), and bytes that are
    wanted later are left (``reserved``).
    """

    def __init__(
        self, loaded: LoadedModel, cache: CacheConfig, draft_bytes_per_block: int = 0, reserved: int = 0
    ) -> None:
        self._model = loaded.model
        self.vocab_size = loaded.spec.vocab_size
        self._device = loaded.device
        self.team = loaded.team
        self._block_size = cache.block_size
        self.num_blocks = num_kv_blocks(loaded, cache, draft_bytes_per_block, reserved)
        spare_blocks = int(loaded.cuda_graphs)
        spec = attention_spec(loaded, cache, self.num_blocks + spare_blocks)
        self.kv_bytes = spec.num_blocks * spec.bytes_per_block
        ranks = loaded.all_ranks
        self._attention = loaded.make_attention(spec) if ranks is None else ranks.allocate(spec.num_blocks)
        self._graphs: StepGraphs | None = None
        if loaded.cuda_graphs:
            self._graphs = StepGraphs(loaded.model, self._attention, -(-loaded.max_model_len // cache.block_size))
        if self._device.type == "cuda":
            self._compile_kernels()

    @torch.inference_mode()
    def _compile_kernels(self) -> None:
        """Run a step of one token, and one of more than graphs are for, in the first blocks.

        A GPU's kernels are compiled when they are first used, for up to minutes: for no request, so.
        """
        sampling, length = SamplingParams(max_tokens=1, seed=0), 32  # which no model is too short for
        blocks = array("i", range(-(-length // self._block_size)))
        for count, number in ((1, 1), (length, GRAPH_SIZES[-1] // length + 1)):
            requests = [Request(f"compile kernels {index}", b"", "", sampling, [1] * count) for index in range(number)]
            self.execute([ScheduledSequence(one, 0, one.prompt_token_ids, 0, 0, 1, blocks) for one in requests])

    def execute(
        self, sequences: Sequence[ScheduledSequence], capture: Sequence[int] = ()
    ) -> tuple[torch.Tensor, Features | None]:
        """Compute the scheduled tokens and write their KV.

        Returns:
            Logits [L, vocab] float32: for each sequence in order, the last ``num_logits`` of its rows. Where nobody
            wants others, only each row's largest has to be right. And the features of all tokens, if layers are
            captured.
        """
        if self._graphs is not None:
            output, batch = self._graphs.forward(lay_out(sequences, self._block_size), capture)
        else:
            num_prefilling = sum(1 for _ in takewhile(lambda sequence: not sequence.decodes, reversed(sequences)))
            batch = build_batch(sequences, self._block_size, self._device, num_prefilling)
            output = self._model.forward(batch, self._attention, capture)
        collect_embeddings(sequences, output.hidden)
        wanted = batch.logits_indices
        rows = output.hidden if wanted.shape[0] == output.hidden.shape[0] else output.hidden[wanted]
        features = None if output.features is None else Features(output.features, batch.slot_mapping)
        only_largest = 0 < len(rows) <= MOST_ROWS and all(
            takes_largest_logit(sequence.request.sampling) for sequence in sequences if sequence.num_logits
        )
        return self._model.compute_logits(rows, only_largest), features


class BatchSequence(Protocol):
    """One sequence's part of a batch; fields as in ``ScheduledSequence``."""

    @property
    def start(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def block_ids(self) -> array[int]: ...


def slots_of(block_ids: Sequence[int], begin: int, end: int, block_size: int) -> Sequence[int]:
    """Where the KV of a sequence's positions begin .. end - 1 is: block * block_size + offset."""
    block = begin // block_size
    if end <= (block + 1) * block_size:  # nearly always
        shift = (block_ids[block] - block) * block_size
        return range(begin + shift, end + shift)
    return [block_ids[p // block_size] * block_size + p % block_size for p in range(begin, end)]


def lay_out(sequences: Iterable[BatchSequence], block_size: int) -> FlatTokens:
    """Lay the sequences' tokens end to end.

    By Python lists: nearly every step has a few tokens, where they are several times faster than arrays.
    """
    flat = FlatTokens([], [], [0], [], [], [], [])
    token_ids, positions, ends, seq_lens, blocks, slots, wanted = flat
    for sequence in sequences:
        start, tokens, block_ids = sequence.start, sequence.token_ids, sequence.block_ids
        end = start + len(tokens)
        token_ids += tokens
        positions += range(start, end)
        slots += slots_of(block_ids, start, end, block_size)
        num_tokens = len(token_ids)
        wanted += range(num_tokens - sequence.num_logits, num_tokens)
        ends.append(num_tokens)
        seq_lens.append(end)
        blocks.append(block_ids)
    return flat


def build_batch(
    sequences: Sequence[BatchSequence], block_size: int, device: torch.device = _CPU, num_prefilling: int = 0
) -> ForwardBatch:
    """The sequences' tokens, and which blocks they have."""
    flat = lay_out(sequences, block_size)
    return flat.batch(padded_block_tables(flat.block_ids), num_prefilling).on(device)


def attention_spec(loaded: LoadedModel, cache: CacheConfig, num_blocks: int) -> AttentionSpec:
    """The KV cache's shape for ``num_blocks`` blocks, of the heads that this process has."""
    share = loaded.spec.share(loaded.num_ranks)
    return AttentionSpec(
        num_layers=loaded.spec.num_layers,
        num_heads=share.num_heads,
        num_kv_heads=share.num_kv_heads,
        head_dim=loaded.spec.head_dim,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        scale=loaded.spec.attention_scale,
        windows=loaded.spec.windows,
    )


def num_kv_blocks(loaded: LoadedModel, cache: CacheConfig, draft_bytes_per_block: int = 0, reserved: int = 0) -> int:
    """As configured, or what fits in the given share of the memory that is free now and not ``reserved``, up to
    ``max_bytes``.

    Raises:
        ModelError: not even one sequence of ``max_model_len`` tokens fits.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    budget = max(int((_free_memory(loaded.device) - reserved) * cache.memory_fraction), 0)
    if cache.max_bytes is not None:
        budget = min(budget, cache.max_bytes)
    per_block = attention_spec(loaded, cache, 1).bytes_per_block + draft_bytes_per_block
    return cache.num_blocks_in(budget, per_block, loaded.max_model_len)


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = free_memory()
    if free is None:
        raise ModelError("the system does not say how much memory is free; set cache.num_blocks")
    return free
