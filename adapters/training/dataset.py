"""Training windows: a stretch of a conversation with the features that the draft sees and the labels it should give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evospec.adapters.chain_walk import ChainBatch
from evospec.adapters.training.conversations import Conversation, open_features, read_shard

MAX_WINDOW = 448
CONTEXT = 80
"""Positions before the first with a loss that a later window of a conversation begins with."""
TEMPLATE_TOKENS = 32
"""What the chat template puts before every prompt teaches nothing."""


@dataclass(frozen=True)
class Window:
    """Positions ``begin`` .. ``end`` - 1 of a conversation whose first token is row ``row`` of its shard."""

    shard: int
    row: int
    begin: int
    end: int
    first_anchor: int  # first position with a loss


@dataclass(frozen=True)
class Batch(ChainBatch):
    """Some windows, and a chain from each position with a loss."""

    features: torch.Tensor  # [B, T, n * hidden] bf16: the target's features of position t - 1, zero for position 0
    labels: torch.Tensor  # [B, T + S, hidden] bf16: the output of the target's last layer at t, which gives token t + 1
    lengths: torch.Tensor  # [N] int64: steps of each chain that are within its window

    def features_of_starts(self) -> torch.Tensor:
        """[N, n * hidden] bf16, where chains start."""
        return self.features.flatten(0, 1)[self.starts]


def is_held_out(conversation: Conversation) -> bool:
    """Whether a conversation is for validation. Keys are hashes, so this is an unbiased sample."""
    return conversation.key % 50 == 0


class Dataset:
    """All windows of some shards. Prompts are learned from too: they are more text, which is what a draft lacks.

    Args:
        shards: paths.
        width: columns of a feature row.
        hidden: columns of the last layer's output at its end.
        validation: take the held-out conversations instead of the others.
    """

    def __init__(self, shards: Sequence[Path], width: int, hidden: int, validation: bool = False) -> None:
        self._hidden, self._width = hidden, width
        self._token_ids: list[torch.Tensor] = []
        self._features: list[torch.Tensor] = []
        self.windows: list[Window] = []
        for path in shards:
            self._add(path, validation)

    def _add(self, path: Path, validation: bool) -> None:
        row, ids = 0, []
        for conversation in read_shard(path):
            length = len(conversation.token_ids)
            ids.append(conversation.token_ids)
            if is_held_out(conversation) == validation and length - conversation.prompt_length >= 4:
                self._cut(row, length, conversation.prompt_length if validation else TEMPLATE_TOKENS)
            row += length
        self._token_ids.append(torch.from_numpy(np.concatenate(ids)))
        self._features.append(open_features(path, self._width))

    def _cut(self, row: int, length: int, anchor: int) -> None:
        """Windows with a loss from position ``anchor`` on."""
        shard = len(self._token_ids)
        begin = max(0, anchor - 2 * CONTEXT)
        while anchor < length - 4:
            end = min(length, begin + MAX_WINDOW)
            self.windows.append(Window(shard, row, begin, end, anchor - begin))
            begin, anchor = end - CONTEXT, end

    @property
    def num_anchors(self) -> int:
        """Distinct positions with a loss."""
        return sum(w.end - w.begin - w.first_anchor for w in self.windows)

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """[vocab] int64, over all tokens of the shards."""
        return sum(
            (torch.bincount(ids.long(), minlength=vocab_size) for ids in self._token_ids),
            torch.zeros(vocab_size, dtype=torch.int64),
        )

    def batches(self, max_tokens: int, steps: int, generator: np.random.Generator) -> Iterator[Batch]:
        """One pass in random order; windows of like length together, at most ``max_tokens`` padded positions each."""
        order = generator.permutation(len(self.windows))
        for start in range(0, len(order), 1024):
            some = sorted((self.windows[i] for i in order[start : start + 1024]), key=lambda w: w.end - w.begin)
            groups: list[list[Window]] = [[]]
            for window in some:
                if (len(groups[-1]) + 1) * (window.end - window.begin) > max_tokens:
                    groups.append([])
                groups[-1].append(window)
            for index in generator.permutation(len(groups)):
                if groups[index]:
                    yield self.collate(groups[index], steps)

    def collate(self, windows: Sequence[Window], steps: int) -> Batch:
        length = max(w.end - w.begin for w in windows)
        hidden, inputs = self._hidden, self._width - self._hidden
        token_ids = torch.zeros(len(windows), length + steps, dtype=torch.int64)
        features = torch.zeros(len(windows), length, inputs, dtype=torch.bfloat16)
        labels = torch.zeros(len(windows), length + steps, hidden, dtype=torch.bfloat16)
        for index, w in enumerate(windows):
            size, rows = w.end - w.begin, self._features[w.shard]
            token_ids[index, :size] = self._token_ids[w.shard][w.row + w.begin : w.row + w.end]
            labels[index, :size] = rows[w.row + w.begin : w.row + w.end, inputs:]
            skipped = int(w.begin == 0)
            features[index, skipped:size] = rows[w.row + w.begin - 1 + skipped : w.row + w.end - 1, :inputs]
        begins, ends, firsts = torch.tensor([(w.begin, w.end, w.begin + w.first_anchor) for w in windows]).T[..., None]
        positions = begins + torch.arange(length)
        is_start = (positions >= firsts) & (positions < ends)
        starts = is_start.flatten().nonzero().flatten()
        return Batch(token_ids, positions, starts, features, labels, lengths=(ends - positions)[is_start])
