"""What a GPU needs besides weights and KV cache, by arithmetic: the cache gets what is left.

All of it is taken after the cache's size is fixed, so none of it can be measured before. NOT CHECKED on a GPU so far.
"""

from __future__ import annotations

from typing import NamedTuple

from evospec.engine.config import EngineConfig
from evospec.engine.models.config import ModelSpec
from evospec.engine.prompt_chunks import MOST_PROMPT_ROWS
from evospec.kernels.int4 import PIECE

GRAPH_SIZES: tuple[int, ...] = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 32))
"""Tokens of a step's CUDA graphs. Larger steps keep a GPU busy without one."""
CHAIN_SIZES: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Sequences of a graph of draft chains: each length of chain has graphs of its own, so there are few sizes."""
ATTENTION_WORKSPACE = 128 * 2**20
"""What flashinfer recommends for the partial results of long contexts that it splits."""
_PLAN_WORKSPACE = 8 * 2**20
"""What each of its wrappers takes for plans."""
_CUBLAS_WORKSPACE = 32 * 2**20
"""Of each stream on which matrices are multiplied; as on Hopper, where it is largest."""
_STREAMS = 5
"""The usual one, and for each of the two recorders of graphs one to warm up and one to capture on."""
_EXPANDED_BYTES = 2 * PIECE
"""What of a matrix of 4 bits is expanded at once, on each of them."""
_DRAFTED_BYTES = 4 * 2**20
"""Of the longest chains of most sequences: their tokens, and with a prior what those are chosen from."""
_GRAPH_NODE_BYTES, _NODES_A_LAYER = 2048, 60
_CONTEXT_BYTES = 512 * 2**20
"""Of a process that has done nothing on the GPU but begin: the worker, which writes drafts' weights there."""
_COLLECTIVES_BYTES = 512 * 2**20
"""NCCL's buffers, which it takes when ranks first compute together."""


class GpuReserve(NamedTuple):
    """Bytes of each kind; all of them are to be kept free of KV cache."""

    activations: int
    """Of the largest step."""
    logits: int
    """Of its rows that tokens are chosen from, and of prompts whose logits are wanted."""
    workspaces: int
    """Of attention and matrix products."""
    graphs: int
    others: int
    """Of the worker that trains drafts, and of what connects several GPUs."""


def gpu_reserve(config: EngineConfig, spec: ModelSpec, element: int, has_draft: bool) -> GpuReserve:
    """What a GPU needs besides weights and KV cache.

    Args:
        config: how many tokens and sequences a step may have.
        spec: of the target; a draft's layer is no wider.
        element: bytes of an activation.
        has_draft: whether a draft has an attention of its own.
    """
    tokens = config.scheduler.max_batched_tokens
    drafted = config.speculation.num_speculative_tokens if has_draft else 0
    rows = _num_rows(config, drafted)
    # Products in the model's dtype, the same in float32, an edited copy, and the best of each piece; then the copy that
    # graphs read, and which of it is a number.
    logits = rows * spec.vocab_size * (element + 9) + GRAPH_SIZES[-1] * spec.vocab_size * 5
    activations = tokens * _activation_bytes(spec, element)
    max_blocks = -(-config.model.longest_sequence(spec) // config.cache.block_size)
    graphs = _graph_bytes(spec, max_blocks, drafted) + GRAPH_SIZES[-1] * _activation_bytes(spec, element)
    others = _CONTEXT_BYTES if has_draft and config.alignment.is_on else 0
    others += _COLLECTIVES_BYTES if config.runtime.tensor_parallel_size > 1 else 0
    return GpuReserve(activations, logits, _workspace_bytes(spec, drafted), graphs, others)


def _num_rows(config: EngineConfig, drafted: int) -> int:
    """Rows of logits of a step, at most. Copies are longer than what is drafted otherwise."""
    scheduler, speculation = config.scheduler, config.speculation
    has_copies = drafted and speculation.copies and speculation.adaptive
    drafts = scheduler.most_extra_rows if has_copies else scheduler.max_num_seqs * drafted
    extra = min(drafts + MOST_PROMPT_ROWS, scheduler.most_extra_rows)
    return min(scheduler.max_num_seqs + extra, scheduler.max_batched_tokens)


def _activation_bytes(spec: ModelSpec, element: int) -> int:
    """Of one token while plain torch computes a layer, with norms and rotations in float32; fused kernels take less."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    stream = spec.hidden_size * (4 * element + 3 * 4)
    features = 2 * 3 * spec.hidden_size * element  # captured, then side by side
    return stream + features + max(4 * spec.intermediate_size * element, heads * (2 * element + 3 * 4))


def _workspace_bytes(spec: ModelSpec, drafted: int) -> int:
    """flashinfer has two wrappers for plain steps and one a graph, for each window of the target; and the draft's."""
    plain, attention = 2 + len(GRAPH_SIZES), ATTENTION_WORKSPACE * (2 if drafted else 1)
    of_draft = plain + len(CHAIN_SIZES) * (drafted - 1) if drafted else 0
    wrappers = len(set(spec.windows)) * plain + of_draft
    return attention + wrappers * _PLAN_WORKSPACE + _STREAMS * (_CUBLAS_WORKSPACE + _EXPANDED_BYTES)


def _graph_bytes(spec: ModelSpec, max_blocks: int, drafted: int) -> int:
    """What the driver keeps of them, and the page tables that they read."""
    nodes = len(GRAPH_SIZES) * (spec.num_layers + 1) * _NODES_A_LAYER  # and the choice
    rows = sum(GRAPH_SIZES) * len(set(spec.windows))
    if drafted:
        nodes += (
            2 * len(GRAPH_SIZES) * _NODES_A_LAYER + 2 * len(CHAIN_SIZES) * sum(range(1, drafted + 1)) * _NODES_A_LAYER
        )
        rows += sum(GRAPH_SIZES) + sum(CHAIN_SIZES) * (drafted - 1)
    return nodes * _GRAPH_NODE_BYTES + rows * max_blocks * 4 + (_DRAFTED_BYTES if drafted else 0)
