"""What the engine's prior adds to the draft's logits, as far as the sequences' own text tells (``engine.vocab.prior``).

A draft that is served with the prior is taught and scored with it: what the text brings by itself need not be learned,
and where it misleads there is more to learn. The text is a segment's, as the worker has it; what the session said
before and what general text says are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.records import Segment
from engine.vocab.ngrams import NgramSizes, SessionNgrams, lookup
from engine.vocab.prior import FEATURES
from engine.vocab.text_matches import make_text_index, match_continuations
from kernels.native_text import MAX_PLACES

_IN_SESSION, _BIGRAM, _TRIGRAM, _MATCH = map(FEATURES.index, ("in_session", "bigram", "trigram", "match"))
_NEVER = torch.iinfo(torch.int64).max
_SIZES = NgramSizes()
_FEATURE_OF = torch.tensor([_BIGRAM] * _SIZES.bigram_width + [_TRIGRAM] * _SIZES.trigram_width + [_MATCH] * MAX_PLACES)
"""[W]: of which feature each of a position's W values is."""


@dataclass(frozen=True)
class TextPrior:
    """Of B segments, padded on the right to L positions.

    ``text`` [B, L] int64. ``weights`` [B, L, NUM_FEATURES] float32: those that the engine drafted with after each
    position. ``token_ids`` [B, L, W] int64 (-1: none) and ``values`` [B, L, W] float32: what followed where the text
    had ended so before, and how strongly each feature speaks for it.
    """

    text: torch.Tensor
    weights: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor

    def bonus(self, rows: torch.Tensor, starts: torch.Tensor, step: int, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, R] float32: what is added to the logits of some tokens at one step of n chains.

        Args:
            rows, starts: [n] int64, where in B and L the chains start.
            step: from 0; the chain's last token is at ``starts + step``.
            token_ids: [R] int64 ascending.
        """
        ends, weights = starts + step, self.weights[rows, starts]
        is_in_text = self._first_places(token_ids)[rows] <= ends[:, None]
        bonus = weights[:, _IN_SESSION, None] * is_in_text
        columns, is_known = _find(token_ids, self.token_ids[rows, ends])
        values = self.values[rows, ends] * weights[:, _FEATURE_OF]
        return bonus.scatter_add_(1, columns, torch.where(is_known, values, 0.0))

    def _first_places(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[B, R]: where in the text each token comes first."""
        columns, is_known = _find(token_ids, self.text)
        places = torch.where(is_known, torch.arange(self.text.shape[1]), _NEVER)
        return torch.full((len(self.text), len(token_ids)), _NEVER).scatter_reduce_(1, columns, places, "amin")


def make_text_prior(segments: Sequence[Segment], length: int) -> TextPrior | None:
    """Of some segments, padded to ``length`` positions; None where the engine drafted without a prior."""
    if not any(segment.prior.any() for segment in segments):
        return None
    size = len(segments), length
    text = torch.full(size, -1)
    weights = torch.zeros(*size, len(FEATURES))
    token_ids, values = torch.full((*size, len(_FEATURE_OF)), -1), torch.zeros(*size, len(_FEATURE_OF))
    for row, segment in enumerate(segments):
        n, first = len(segment.positions), int(segment.anchors.nonzero()[0])
        text[row, :n], weights[row, :n] = segment.token_ids, segment.prior
        token_ids[row, first:n], values[row, first:n] = _continuations(segment.token_ids.tolist(), first)
    return TextPrior(text, weights, token_ids, values)


def _continuations(text: Sequence[int], first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What may follow each position from ``first`` on, and how strongly each feature speaks for it: [n - first, W]."""
    ngrams, index = SessionNgrams(max(text) + 1, _SIZES), make_text_index()
    ngrams.observe(text[:first])
    index.extend(text[:first])
    found = []
    for end in range(first, len(text)):
        ngrams.observe(text[end : end + 1], text[max(end - 2, 0) : end])
        index.extend(text[end : end + 1])
        two_ago, one_ago = [-1, *text[: end + 1]][-2:]
        found.append((*lookup([ngrams], [(two_ago, one_ago)]), match_continuations([index], [[]])))
    token_ids = np.stack([np.concatenate([each.token_ids[0] for each in position]) for position in found])
    values = np.stack([np.concatenate([each.values[0] for each in position]) for position in found])
    return torch.from_numpy(token_ids).long(), torch.from_numpy(values)


def _find(ascending: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where among some tokens others are, and whether they are there at all."""
    columns = torch.searchsorted(ascending, token_ids).clamp(max=len(ascending) - 1)
    return columns, ascending[columns] == token_ids
