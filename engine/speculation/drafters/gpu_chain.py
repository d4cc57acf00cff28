"""Chains of draft tokens on a GPU, without the host in between: two CUDA graphs for all drafts of a step.

The first reads the tokens that the draft has not seen. The second drafts token after token, each from the one before.
What they need of the host is known before either begins, and goes there in one copy each.

NOT RUN on a GPU so far (docs/decisions/006-cuda-graphs.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.batch import ForwardBatch, padded_block_tables
from evospec.engine.config import MAX_SPECULATIVE_TOKENS
from evospec.engine.gpu_memory import CHAIN_SIZES, GRAPH_SIZES
from evospec.engine.model_runner import lay_out
from evospec.engine.online.adapters import EagleAdapters
from evospec.engine.request import Request
from evospec.engine.sampling.choose import row_sampling
from evospec.engine.speculation.drafters.eagle_network import EagleNetwork
from evospec.engine.speculation.drafters.gpu_head import GpuHead
from evospec.engine.speculation.drafters.kv import Chunk
from evospec.engine.step import DraftSlot, Proposal
from evospec.engine.step_graphs import CudaGraphRecorder, Planned, Replay, filled_up, padded, read_by_graphs
from evospec.kernels.batched_lora import LoraRows
from evospec.kernels.choose_tokens import GpuRows, RowSampling, choice_arrays
from evospec.kernels.session_memory import DraftedRounds
from evospec.kernels.session_options import drafted_ints
from evospec.kernels.upload import FixedMemory


@dataclass(frozen=True)
class _Graph:
    """A recorded computation and the memory that it reads."""

    attentions: list[AttentionBackend]
    memory: FixedMemory
    state: torch.Tensor | None
    """[R, hidden], the draft's state that a chain begins with"""
    replay: Replay
    output: torch.Tensor


class GpuChain:
    """Drafts for an ``EagleProposer``.

    Args:
        network: the draft's arithmetic.
        embed: rows of the embedding: [T] int32 → [T, hidden].
        attention: the draft's KV cache, whose last block no sequence uses.
        head: of the draft.
        g_of: [T] int64 slots → g of the tokens in them, [T, hidden].
        no_slot: the slot of what comes before a sequence.
        max_blocks: of a sequence.
        adapters: of the draft (None: there are none).
    """

    def __init__(
        self,
        network: EagleNetwork,
        embed: Callable[[torch.Tensor], torch.Tensor],
        attention: AttentionBackend,
        head: GpuHead,
        g_of: Callable[[torch.Tensor], torch.Tensor],
        no_slot: int,
        max_blocks: int,
        adapters: EagleAdapters | None,
    ) -> None:
        self._network, self._embed, self._attention, self._head = network, embed, attention, head
        self._g_of, self._no_slot, self._max_blocks, self._adapters = g_of, no_slot, max_blocks, adapters
        self._spare_block, self._block_size = attention.spec.num_blocks - 1, attention.spec.block_size
        self._record = CudaGraphRecorder()
        self._readers: dict[int, _Graph] = {}
        self._chains: dict[tuple[int, int, bool], _Graph] = {}
        count, device = MAX_SPECULATIVE_TOKENS * CHAIN_SIZES[-1] * drafted_ints(head.num_kept), attention.spec.device
        self._drafted = torch.empty(count, dtype=torch.int32, device=device)
        """What chains choose, and from what; all graphs use it."""
        self._rows = torch.arange(CHAIN_SIZES[-1], device=device)
        """[B] int64; graphs read it, so it stays."""
        self._on_host = torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._fixed: dict[tuple[int, int], AttentionBackend] = {}
        """By the size of a chain's graph and a place in the chain: chains of all lengths share them."""

    def can_read(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there are graphs for so many tokens."""
        return sum(len(chunk.token_ids) for chunk in chunks) <= max(GRAPH_SIZES)

    def can_draft(self, slots: Sequence[DraftSlot]) -> bool:
        """Whether there are graphs for so many sequences."""
        return len(slots) <= max(CHAIN_SIZES)

    def read(self, chunks: Sequence[Chunk], g_slots: Sequence[int]) -> torch.Tensor:
        """Write the entries of tokens; returns the draft's state [L, hidden] at those whose logits are wanted.

        Args:
            chunks: the tokens; for which ``can_read``.
            g_slots: the slot of the position before each.
        """
        flat = lay_out(chunks, self._block_size)
        num_wanted, size = len(flat.logits_indices), GRAPH_SIZES[bisect_left(GRAPH_SIZES, len(flat.token_ids))]
        more = padded(flat, size, self._spare_block, self._block_size)
        arrays = read_by_graphs(more)
        arrays.append(filled_up(np.array(g_slots, np.int64), size, self._no_slot))
        arrays.append(self._adapter_slots((chunk.request for chunk in chunks for _ in chunk.token_ids), size))
        graph = self._readers.get(size)
        if graph is None:
            graph = self._readers[size] = self._record_reader(more, arrays)
        graph.memory.write(*arrays)
        graph.attentions[0].plan(_placed(more, graph.memory.tensors[2]))
        graph.replay()
        return graph.output[:num_wanted]

    def draft(self, a: torch.Tensor, slots: Sequence[DraftSlot]) -> list[Proposal]:
        """Draft tokens for each slot, as many as it has room for.

        Args:
            a: [B, hidden], the draft's state after each sequence's last known token.
            slots: one a row, each with room for a token.
        """
        requests, length = [slot.request for slot in slots], max(slot.num_tokens for slot in slots)
        size = CHAIN_SIZES[bisect_left(CHAIN_SIZES, len(slots))]
        sampling = row_sampling([request.sampling for request in requests])
        plans, arrays = self._plans(slots, length, size)
        arrays += self._head.begin(requests, size), self._adapter_slots(requests, size)
        if sampling is not None:
            arrays += _noise(sampling, [request.num_tokens for request in requests], length, size)
        key = size, length, sampling is not None
        graph = self._chains.get(key)
        if graph is None:
            graph = self._chains[key] = self._record_chain(a, plans, arrays, size, length)
        assert graph.state is not None
        graph.memory.write(*arrays)
        graph.state[: len(a)].copy_(a)
        for place, (attention, plan) in enumerate(zip(graph.attentions, plans, strict=True)):
            attention.plan(_placed(plan, graph.memory.tensors[0][place]))
        graph.replay()
        block = self._on_host[: graph.output.numel()].view(graph.output.shape)
        block.copy_(graph.output)
        self._head.learn_from(requests, [slot.num_tokens for slot in slots], block)
        of_slots = zip(slots, block[:, : len(slots)].T.tolist(), strict=True)
        return [Proposal(tokens[: slot.num_tokens]) for slot, tokens in of_slots]

    def _plans(
        self, slots: Sequence[DraftSlot], length: int, size: int
    ) -> tuple[list[ForwardBatch], list[NDArray[np.integer[Any]]]]:
        """Where the tokens of the second and further places in the chains go.

        Those without room, and those of a row too many, go to the spare block.

        Returns:
            of each place what attention is planned from, and what graphs read: slots and positions, [places, size].
        """
        of_slots = padded_block_tables([slot.block_ids for slot in slots])
        count, places, block_size = len(slots), np.arange(length - 1)[:, None], self._block_size
        is_live = np.array([slot.num_tokens for slot in slots]) > places + 1
        first = np.array([slot.request.num_tokens - self._network.shift for slot in slots])
        positions = np.zeros((length - 1, size), np.int32)
        tables = np.full((length - 1, size, of_slots.shape[1]), self._spare_block, np.int32)
        np.copyto(positions[:, :count], first + places, where=is_live)
        np.copyto(tables[:, :count], of_slots, where=is_live[..., None])
        entries = tables[places, np.arange(size), positions // block_size] * block_size + positions % block_size
        by_place = (map(torch.from_numpy, values) for values in (positions, positions + 1, tables))
        ends = torch.from_numpy(np.arange(size + 1, dtype=np.int32))
        plans = [ForwardBatch(at, at, ends, lengths, ids, at, at) for at, lengths, ids in zip(*by_place, strict=True)]
        return plans, [entries.astype(np.int64), positions]

    def _adapter_slots(self, requests: Iterable[Request], size: int) -> NDArray[Any]:
        """[size] int32: whose adapter each row has; -1: none."""
        slots = [] if self._adapters is None else self._adapters.slots_of(requests)
        return filled_up(np.array(slots, np.int32), size, -1)

    def _lora(self, slots: torch.Tensor) -> LoraRows | None:
        return None if self._adapters is None else LoraRows(slots, self._adapters.parts)

    def _record_reader(self, batch: ForwardBatch, arrays: list[NDArray[Any]]) -> _Graph:
        memory = FixedMemory(self._attention.spec.device, *arrays)
        token_ids, positions, slots, wanted, g_slots, adapters = memory.tensors
        attention = self._attention.fixed(len(batch.token_ids), self._max_blocks)
        own = replace(_placed(batch, slots), token_ids=token_ids, positions=positions, logits_indices=wanted)
        attention.plan(own)

        def run() -> torch.Tensor:
            return self._network.forward(
                own, Planned(attention), self._embed(token_ids), self._g_of(g_slots), self._lora(adapters)
            )

        replay, output = self._record(run)
        return _Graph([attention], memory, None, replay, output)

    def _record_chain(
        self, a: torch.Tensor, plans: list[ForwardBatch], arrays: list[NDArray[Any]], size: int, length: int
    ) -> _Graph:
        memory = FixedMemory(self._attention.spec.device, *arrays)
        slots, positions, own, adapters, *noise = memory.tensors
        state = torch.zeros(size, a.shape[1], dtype=a.dtype, device=a.device)
        attentions = []
        for place in range(1, length):
            if (size, place) not in self._fixed:
                self._fixed[size, place] = self._attention.fixed(size, self._max_blocks)
            attentions.append(self._fixed[size, place])
            attentions[-1].plan(_placed(plans[place - 1], slots[place - 1]))

        block = self._drafted[: length * size * drafted_ints(self._head.num_kept)].view(length, -1)
        drafted = DraftedRounds(block, size, self._head.num_kept)

        def run() -> torch.Tensor:
            now = state
            for place in range(length):
                if place:
                    batch = replace(plans[place - 1], positions=positions[place - 1], logits_indices=self._rows[:size])
                    attention = Planned(attentions[place - 1])
                    embedded = self._embed(drafted.chosen(place - 1))
                    now = self._network.forward(batch, attention, embedded, now, self._lora(adapters))
                of_place = GpuRows.of(noise[:4], noise[4][place]) if noise else None
                self._head.choose(self._network.head_input(now), own, of_place, drafted, place)
            return block

        replay, output = self._record(run)
        return _Graph(attentions, memory, state, replay, output)


def _placed(batch: ForwardBatch, slots: torch.Tensor) -> ForwardBatch:
    """A batch on the host, for a plan of attention; its slots are on the device already."""
    return replace(batch, token_ids=slots, slot_mapping=slots, on_host=batch)


def _noise(sampling: RowSampling, positions: Sequence[int], length: int, size: int) -> list[NDArray[Any]]:
    """What the choices of ``size`` chains of ``length`` tokens need; rows too many are greedy."""
    rows, first = sampling.padded(size), [*positions, *[0] * (size - len(positions))]
    by_place = [choice_arrays(rows, [position + place for position in first]) for place in range(length)]
    return [*by_place[0][:4], np.stack([arrays[4] for arrays in by_place])]
