"""The draft along chains that start at some positions of a batch; other positions are only attended to.

``adapters.unroll`` computes the same for a chain from every position, which is what training on whole windows wants.
Here most positions are a prompt's or teach nothing: of those only keys and values are needed, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from adapters.unroll import TargetParts
from engine.models.eagle3 import Additions, Eagle3


def unroll_chains(
    draft: Eagle3,
    target: TargetParts,
    lora: Additions | None,
    g: torch.Tensor,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    lengths_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's input [M, hidden] at the steps of N chains, and how many steps each has, [N].

    First come all first steps, in the order of ``starts``, then the second ones of those chains that have one, and so
    on. Step s of the chain that starts at t takes the token at t + s. It attends to the committed tokens up to t and to
    the chain's own (EAGLE-3's training-time test, arXiv 2503.01840).

    Args:
        lora: an adapter of the draft.
        g: [B, T, hidden] fused features of the positions before.
        token_ids: [B, T + S] int64, for chains of up to S steps.
        positions: [B, T] int64
        starts: [N] int64 ascending, index into B * T
        lengths_of: from the head's input [N, hidden] of the first step to how many steps each chain has, [N] int64
            from 1 to S.
    """
    config, length, first = draft.config, positions.shape[1], positions.flatten()[starts]
    rows, columns = starts // length, starts % length
    q, k, v = draft.qkv(F.embedding(token_ids[:, :length], target.embedding), g, lora)
    context = _Context(target.rotary(k.flatten(0, 1), positions.flatten()).view_as(k), v, rows, columns)
    q, g = target.rotary(q.flatten(0, 1)[starts], first), g.flatten(0, 1)[starts]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    while True:
        groups = q.view(len(q), config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
        g = draft.output(g, context.attended(groups, keys, values).flatten(1, 2), lora)
        states.append(draft.head_input(g))
        step = len(states)
        if step == 1:
            lengths = all_lengths = lengths_of(states[0])
        stays = (lengths > step).nonzero().flatten()
        if not len(stays):
            return torch.cat(states), all_lengths
        g, lengths, rows, columns, first = (each[stays] for each in (g, lengths, rows, columns, first))
        context = context.of(stays)
        q, k, v = draft.qkv(F.embedding(token_ids[rows, columns + step], target.embedding), g, lora)
        q = target.rotary(q, first + step)
        keys = [*(each[stays] for each in keys), target.rotary(k, first + step)]
        values = [*(each[stays] for each in values), v]


class _Context:
    """The committed tokens' keys and values [B, T, kv_heads, head_dim], of which each chain sees those up to its start.

    Args:
        rows, columns: [N] int64, where in B and T the chains start, ascending.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self._keys, self._values, self._rows, self._columns = keys, values, rows, columns
        self._num_chains = torch.bincount(rows, minlength=len(keys)).tolist()
        is_later = torch.arange(keys.shape[1]) > columns[:, None]
        self._hidden = self._of_segments(is_later)

    def of(self, chains: torch.Tensor) -> _Context:
        """The same for some of the chains, by ascending numbers."""
        return _Context(self._keys, self._values, self._rows[chains], self._columns[chains])

    def attended(
        self, q: torch.Tensor, later_keys: Sequence[torch.Tensor], later_values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Queries [N, kv_heads, queries each, head_dim] over the context and their chain's own entries since.

        ``later_keys`` and ``later_values``: of each step after the first, [N, kv_heads, head_dim].
        """
        q = q * q.shape[-1] ** -0.5
        scores = [
            torch.einsum("ngrd,tgd->ngrt", of_segment, keys).masked_fill(hidden[:, None, None], -torch.inf)
            for of_segment, keys, hidden in zip(self._of_segments(q), self._keys, self._hidden, strict=True)
        ]
        own = [(q * key[:, :, None]).sum(-1, keepdim=True) for key in later_keys]
        weights = torch.cat((torch.cat(scores), *own), dim=-1).softmax(-1)
        shared, *of_own = torch.split_with_sizes(weights, [self._keys.shape[1]] + [1] * len(own), dim=-1)
        attended = torch.cat(
            [
                torch.einsum("ngrt,tgd->ngrd", of_segment, values)
                for of_segment, values in zip(self._of_segments(shared), self._values, strict=True)
            ]
        )
        for weight, value in zip(of_own, later_values, strict=True):
            attended = attended + weight * value[:, :, None]
        return attended

    def _of_segments(self, chains: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, ...] in as many parts as there are segments."""
        return torch.split_with_sizes(chains, self._num_chains)
