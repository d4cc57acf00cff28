"""A draft along chains of tokens that start at some positions of a batch; other positions are only attended to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evospec.adapters.target_parts import TargetParts
from evospec.engine.models.eagle3 import Additions, Eagle3

_ROWS = 32
"""Rows of products come in multiples of it."""


@dataclass(frozen=True)
class ChainBatch:
    """B sequences, padded on the right to T positions, and N chains of up to S steps that start in them.

    Step s of the chain that starts at position t takes the token at t + s and is to give the one after it.
    """

    token_ids: torch.Tensor  # [B, T + S] int64
    positions: torch.Tensor  # [B, T] int64
    starts: torch.Tensor  # [N] int64 ascending, index into B * T

    @property
    def length(self) -> int:
        """The positions T that sequences are padded to."""
        return self.positions.shape[1]


class ChainWalk:
    """The chains of a batch, a step at a time: those that are followed on take their next token.

    A chain attends to the committed tokens up to its start and to its own since (EAGLE-3's training-time test, arXiv
    2503.01840).

    Args:
        draft: drafts, differentiable in its weights.
        target: its frozen parts.
        batch: the chains.
        g: [B, T, hidden], fused features of the position before each.
        lora: what the draft's products gain.
    """

    def __init__(
        self, draft: Eagle3, target: TargetParts, batch: ChainBatch, g: torch.Tensor, lora: Additions | None = None
    ) -> None:
        self._draft, self._target, self._lora, self._token_ids = draft, target, lora, batch.token_ids
        starts, positions = batch.starts, batch.positions.flatten()
        self.chains = torch.arange(len(starts))  # [n] ascending numbers of those that are followed
        self.rows, self.ends = starts // batch.length, starts % batch.length  # [n], where the last token of each is
        self._positions = positions[starts]
        q, k, v = draft.qkv(target.embed(batch.token_ids[:, : batch.length]), g, lora)
        self._context = _Context(target.rotary(k.flatten(0, 1), positions).view_as(k), v, self.rows, self.ends)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._a = self._output(target.rotary(q.flatten(0, 1)[starts], self._positions), g.flatten(0, 1)[starts])

    @property
    def head_input(self) -> torch.Tensor:
        """[n, hidden] at this step."""
        return self._draft.head_input(self._a)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, R] float32 at this step, of some rows [R, hidden] of the target's head."""
        return F.linear(_filled(self.head_input), rows)[: len(self.chains)].float()

    def advance(self, stays: torch.Tensor) -> None:
        """Take the next step with some of the chains, [n] bool."""
        if not stays.all():
            self._follow(stays)
        self.ends, self._positions = self.ends + 1, self._positions + 1
        token_ids = self._token_ids[self.rows, self.ends]
        embedding = self._target.embed(token_ids)
        q, k, v = (of[: len(token_ids)] for of in self._draft.qkv(_filled(embedding), _filled(self._a), self._lora))
        self._keys.append(self._target.rotary(k, self._positions))
        self._values.append(v)
        self._a = self._output(self._target.rotary(q, self._positions), self._a)

    def _follow(self, stays: torch.Tensor) -> None:
        self.chains, self.rows, self.ends = self.chains[stays], self.rows[stays], self.ends[stays]
        self._positions, self._a, self._context = self._positions[stays], self._a[stays], self._context.of(stays)
        self._keys, self._values = [k[stays] for k in self._keys], [v[stays] for v in self._values]

    def _output(self, q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        config = self._draft.config
        groups = q.view(len(q), config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
        with torch.autocast("cpu", enabled=False):
            attended = self._context.attended(groups, self._keys, self._values)
        return self._draft.output(_filled(g), _filled(attended.flatten(1, 2)), self._lora)[: len(q)]


def _filled(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] with zeros behind, so that there are few different n: bf16 products compile a kernel for each."""
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, -len(rows) % _ROWS))


class _Context:
    """The committed tokens' keys and values [B, T, kv_heads, head_dim], of which each chain sees those up to its start.

    Args:
        rows, columns: [N] int64, where in B and T the chains start, ascending.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self._keys, self._values, self._rows, self._columns = keys.float(), values.float(), rows, columns
        self._num_chains = torch.bincount(rows, minlength=len(keys)).tolist()
        is_later = torch.arange(keys.shape[1]) > columns[:, None]
        self._hidden = self._of_sequences(is_later)

    def of(self, chains: torch.Tensor) -> _Context:
        """The context of some of the chains, [N] bool."""
        return _Context(self._keys, self._values, self._rows[chains], self._columns[chains])

    def attended(
        self, q: torch.Tensor, later_keys: Sequence[torch.Tensor], later_values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Queries [N, kv_heads, queries each, head_dim] over the context and their chain's own entries since.

        ``later_keys`` and ``later_values`` [N, kv_heads, head_dim] are those entries, of each step after the first.
        """
        q, later_keys = q.float() * q.shape[-1] ** -0.5, [key.float() for key in later_keys]
        scores = [
            torch.einsum("ngrd,tgd->ngrt", of_sequence, keys).masked_fill(hidden[:, None, None], -torch.inf)
            for of_sequence, keys, hidden in zip(self._of_sequences(q), self._keys, self._hidden, strict=True)
        ]
        own = [(q * key[:, :, None]).sum(-1, keepdim=True) for key in later_keys]
        weights = torch.cat((torch.cat(scores), *own), dim=-1).softmax(-1)
        shared, *of_own = torch.split_with_sizes(weights, [self._keys.shape[1]] + [1] * len(own), dim=-1)
        attended = torch.cat(
            [
                torch.einsum("ngrt,tgd->ngrd", of_sequence, values)
                for of_sequence, values in zip(self._of_sequences(shared), self._values, strict=True)
            ]
        )
        for weight, value in zip(of_own, later_values, strict=True):
            attended = attended + weight * value[:, :, None]
        return attended

    def _of_sequences(self, chains: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[N, ...] in as many parts as there are segments."""
        return torch.split_with_sizes(chains, self._num_chains)
