"""What the engine's prior adds to the draft's logits, as far as the sequences' own text tells.

A draft that is served with the prior is taught and scored with it: what the text brings by itself need not be learned,
and where it misleads there is more to learn. The text is a segment's, as the worker has it; what the session said
before and what general text says are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evospec.adapters.alignment.records import Segment
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import TokenRows
from evospec.kernels.session_options import FEATURES, MAX_REPEATS, SessionOptions, TableSizes

_IN_SESSION, _BIGRAM, _TRIGRAM, _MATCH = map(FEATURES.index, ("in_session", "bigram", "trigram", "match"))
_SIZES = TableSizes()
_FEATURE_OF = torch.tensor([_BIGRAM] * _SIZES.bigram_width + [_TRIGRAM] * _SIZES.trigram_width + [_MATCH] * MAX_REPEATS)
"""[W]: the feature that each of a position's W values belongs to."""


@dataclass(frozen=True)
class TextPrior:
    """What B segments, padded on the right to L positions, say of the tokens to come.

    ``text`` [B, L] int64, and ``is_first`` [B, L] bool: where a token comes for the first time. ``weights`` [B, L,
    NUM_FEATURES] float32: those that the engine drafted with after each position. ``token_ids`` [B, L, W] int64 (-1:
    none) and ``values`` [B, L, W] float32: what followed where the text had ended so before, and how strongly each
    feature speaks for it.
    """

    text: torch.Tensor
    is_first: torch.Tensor
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
        bonus = torch.zeros(len(rows), len(token_ids))
        columns, is_known = _find(token_ids, self.text)
        has_come = torch.arange(self.text.shape[1]) <= ends[:, None]
        in_session = weights[:, _IN_SESSION, None] * ((self.is_first & is_known)[rows] & has_come)
        bonus.scatter_add_(1, columns[rows], in_session)
        columns, is_known = _find(token_ids, self.token_ids[rows, ends])
        return bonus.scatter_add_(1, columns, weights[:, _FEATURE_OF] * self.values[rows, ends] * is_known)


def make_text_prior(segments: Sequence[Segment], length: int) -> TextPrior | None:
    """The prior of some segments, padded to ``length`` positions; None where the engine drafted without one."""
    if not any(segment.prior.any() for segment in segments):
        return None
    size = len(segments), length
    text, is_first = torch.full(size, -1), torch.zeros(size, dtype=torch.bool)
    weights = torch.zeros(*size, len(FEATURES))
    token_ids, values = torch.full((*size, len(_FEATURE_OF)), -1), torch.zeros(*size, len(_FEATURE_OF))
    for row, segment in enumerate(segments):
        n, first = len(segment.positions), int(segment.anchors.nonzero()[0])
        text[row, :n], weights[row, :n] = segment.token_ids, segment.prior
        is_first[row, np.unique(segment.token_ids.numpy(), return_index=True)[1]] = True
        token_ids[row, first:n], values[row, first:n] = _continuations(segment, first)
    return TextPrior(text, is_first, weights, token_ids, values)


def _continuations(segment: Segment, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What may follow each position from ``first`` on, and how strongly each feature speaks for it: [n - first, W]."""
    positions, text = segment.positions.tolist(), segment.token_ids.tolist()
    above = max(text) + 1  # no token of the text
    session, index = Sessions(SessionOptions(1, 0), np.full(above + len(text), True)), Texts(1, 2 * len(text))
    session.clear(0, [0.0] * len(FEATURES))
    index.clear(0)
    found = []
    for row, token_id in enumerate(text):
        # Where some are missing, what was before is no neighbour: a token that never comes again is between.
        is_broken = row and positions[row] != positions[row - 1] + 1
        tokens = [above + row, token_id] if is_broken else [token_id]
        rows = TokenRows()
        rows.add(0, tokens)
        session.catch_up(rows)
        index.extend(rows)
        if row >= first:
            found.append((session.followers(0, 2), session.followers(0, 3), _matches(index)))
    token_ids = np.stack([np.concatenate([ids for ids, _ in position]) for position in found])
    values = np.stack([np.concatenate([strengths for _, strengths in position]) for position in found])
    return torch.from_numpy(token_ids).long(), torch.from_numpy(values)


def _matches(index: Texts) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tokens that continue repeats of a text's end, -1 for none, and log(length) of each: [MAX_REPEATS]."""
    token_ids, lengths = np.full(MAX_REPEATS, -1, np.int32), np.ones(MAX_REPEATS, np.float32)
    found = index.find(0)
    token_ids[: len(found)], lengths[: len(found)] = list(found), list(found.values())
    return token_ids, np.log(lengths)


def _find(ascending: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where among some tokens others are, and whether they are there at all."""
    columns = torch.searchsorted(ascending, token_ids).clamp(max=len(ascending) - 1)
    return columns, ascending[columns] == token_ids
