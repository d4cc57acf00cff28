"""What a draft says along chains that start at some positions of a batch; other positions are only attended to.

``adapters.training.unroll`` computes the same for a chain from every position, as training on whole windows wants it.
Here most positions are a prompt's or teach nothing: of those only keys and values are needed, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adapters.alignment.chains import SegmentBatch
from adapters.target_parts import TargetParts
from engine.models.eagle3 import Additions, Eagle3


@dataclass(frozen=True)
class ChainStep:
    """One step of n of a batch's chains, those that were followed so far."""

    number: int  # the step's number, from 0
    chains: torch.Tensor  # [n] int64 ascending
    logits: torch.Tensor  # [n, R] float32, the draft's for some tokens, and the prior's bonus on them
    columns: torch.Tensor  # [n, k] int64, where among them the target's most likely ones are
    top_logits: torch.Tensor  # [n, k] float32, the target's
    mask: torch.Tensor  # [n] bool, whether the target's distribution is known


GoesOn = Callable[[ChainStep], torch.Tensor]
"""Which of the chains of a step are followed to the next, if there is one, [n] bool; called once for each step."""


@dataclass(frozen=True)
class ChainDrafter:
    """A draft, alone or with an adapter, that drafts along the chains of a batch."""

    draft: Eagle3  # float32, on the CPU
    target: TargetParts
    lora: Additions | None = None

    def steps(self, batch: SegmentBatch, token_ids: torch.Tensor, goes_on: GoesOn | None = None) -> list[ChainStep]:
        """What the draft says at the steps of the chains, one after the other, differentiable in its weights.

        Args:
            batch: the chains.
            token_ids: [R] int64 ascending, all of ``batch.wanted_ids`` among them.
            goes_on: which chains are followed, and how far; None: all to the end.
        """
        walk = ChainWalk(self, batch)
        rows, columns = self.target.head[token_ids].float(), torch.searchsorted(token_ids, batch.top_ids)
        steps: list[ChainStep] = []
        while True:
            chains, number = walk.chains, len(steps)
            of_target = (each[chains, number] for each in (columns, batch.top_logits, batch.mask))
            logits = batch.with_prior(walk.head_input @ rows.T, chains, number, token_ids)
            steps.append(ChainStep(number, chains, logits, *of_target))
            stays = torch.ones_like(steps[-1].mask) if goes_on is None else goes_on(steps[-1])
            if len(steps) == batch.mask.shape[1] or not stays.any():
                return steps
            walk.advance(stays)


class ChainWalk:
    """The chains of a batch, a step at a time: those that are followed on take their next token.

    Step s of the chain that starts at t takes the token at t + s. It attends to the committed tokens up to t and to the
    chain's own (EAGLE-3's training-time test, arXiv 2503.01840).
    """

    def __init__(self, drafter: ChainDrafter, batch: SegmentBatch) -> None:
        self._draft, self._target, self._lora = drafter.draft, drafter.target, drafter.lora
        self._token_ids, starts, positions, length = batch.token_ids, batch.starts, batch.positions, batch.length
        self.chains = torch.arange(len(starts))  # [n] ascending numbers of those that are followed
        self._step = 0
        self._rows, self._columns = starts // length, starts % length
        self._first = positions.flatten()[starts]
        g = batch.inputs.float()
        if g.shape[-1] == self._draft.fc.in_features:
            g = self._draft.fuse(g)
        q, k, v = self._draft.qkv(F.embedding(self._token_ids[:, :length], self._target.embedding), g, self._lora)
        k = self._target.rotary(k.flatten(0, 1), positions.flatten()).view_as(k)
        self._context = _Context(k, v, self._rows, self._columns)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._a = self._output(self._target.rotary(q.flatten(0, 1)[starts], self._first), g.flatten(0, 1)[starts])

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
        """The context of some of the chains, [N] bool."""
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
