"""The draft along chains that start at some positions of a batch; other positions are only attended to.

``adapters.training.unroll`` computes the same for a chain from every position, as training on whole windows wants it.
Here most positions are a prompt's or teach nothing: of those only keys and values are needed, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from adapters.target_parts import TargetParts
from engine.models.eagle3 import Additions, Eagle3


class ChainWalk:
    """N chains, a step at a time: those that are followed on take their next token.

    Step s of the chain that starts at t takes the token at t + s. It attends to the committed tokens up to t and to the
    chain's own (EAGLE-3's training-time test, arXiv 2503.01840).

    Args:
        draft: float32.
        target: its frozen parts.
        lora: an adapter of the draft.
        g: [B, T, hidden] fused features of the positions before.
        token_ids: [B, T + S] int64, for chains of up to S steps.
        positions: [B, T] int64
        starts: [N] int64 ascending, index into B * T
    """

    def __init__(
        self,
        draft: Eagle3,
        target: TargetParts,
        lora: Additions | None,
        g: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        self._draft, self._target, self._lora, self._token_ids = draft, target, lora, token_ids
        self.chains = torch.arange(len(starts))
        """[n] ascending numbers of those that are followed"""
        self._step, length = 0, positions.shape[1]
        self._rows, self._columns = starts // length, starts % length
        self._first = positions.flatten()[starts]
        q, k, v = draft.qkv(F.embedding(token_ids[:, :length], target.embedding), g, lora)
        k = target.rotary(k.flatten(0, 1), positions.flatten()).view_as(k)
        self._context = _Context(k, v, self._rows, self._columns)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._a = self._output(target.rotary(q.flatten(0, 1)[starts], self._first), g.flatten(0, 1)[starts])

    @property
    def head_input(self) -> torch.Tensor:
        """[n, hidden] at this step."""
        return self._draft.head_input(self._a)

    def advance(self, stays: torch.Tensor) -> None:
        """Take the next step with some of the chains, [n] bool."""
        self._step += 1
        if not stays.all():
            self._follow(stays)
        token_ids = self._token_ids[self._rows, self._columns + self._step]
        q, k, v = self._draft.qkv(F.embedding(token_ids, self._target.embedding), self._a, self._lora)
        positions = self._first + self._step
        self._keys.append(self._target.rotary(k, positions))
        self._values.append(v)
        self._a = self._output(self._target.rotary(q, positions), self._a)

    def _follow(self, stays: torch.Tensor) -> None:
        self.chains, self._rows, self._columns = self.chains[stays], self._rows[stays], self._columns[stays]
        self._first, self._a, self._context = self._first[stays], self._a[stays], self._context.of(stays)
        self._keys, self._values = [k[stays] for k in self._keys], [v[stays] for v in self._values]

    def _output(self, q: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        config = self._draft.config
        groups = q.view(len(q), config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
        attended = self._context.attended(groups, self._keys, self._values)
        return self._draft.output(g, attended.flatten(1, 2), self._lora)


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
        """The same for some of the chains, [N] bool."""
        return _Context(self._keys, self._values, self._rows[chains], self._columns[chains])

    def attended(
        self, q: torch.Tensor, later_keys: Sequence[torch.Tensor], later_values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Queries [N, kv_heads, queries each, head_dim] over the context and their chain's own entries since.

        ``later_keys`` and ``later_values`` [N, kv_heads, head_dim] are those entries, of each step after the first.
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
