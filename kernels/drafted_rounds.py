"""Draft tokens that are chosen on a GPU, and what each was chosen from: one block, which the host reads at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.session_options import NUM_FEATURES


@dataclass(frozen=True)
class DraftedRounds:
    """Rounds of a chain, each of which chooses a token for every row; as ``ScoredRounds`` in draft_rounds.h.

    Attributes:
        block: [rounds, rows * ``drafted_ints(columns)``] int32.
        rows: of each round.
        columns: candidates of a row; 0: they are not kept.
    """

    block: torch.Tensor
    rows: int
    columns: int

    def chosen(self, place: int) -> torch.Tensor:
        """[rows] int32: the tokens of a round."""
        return self.block[place, : self.rows]

    def token_ids(self, place: int) -> torch.Tensor:
        """[rows, columns] int32, what they are chosen from."""
        return self._part(place, 0, 1).view(self.rows, -1)

    def logits(self, place: int) -> torch.Tensor:
        """[rows, columns] float32, the draft's."""
        return self._part(place, 1, 1).view(torch.float32).view(self.rows, -1)

    def features(self, place: int) -> torch.Tensor:
        """[rows, NUM_FEATURES, columns] float32."""
        return self._part(place, 2, NUM_FEATURES).view(torch.float32).view(self.rows, NUM_FEATURES, -1)

    def _part(self, place: int, first: int, count: int) -> torch.Tensor:
        size = self.rows * self.columns
        begin = self.rows + first * size
        return self.block[place, begin : begin + count * size]
