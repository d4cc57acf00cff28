"""The tokens that every session can draft."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class CoreSet:
    """The static core of a draft vocabulary.

    Args:
        vocab_size: token ids are below.
        token_ids: the core's; None for all.
    """

    def __init__(self, vocab_size: int, token_ids: NDArray[np.int64] | None) -> None:
        mask = np.full(vocab_size, token_ids is None)
        if token_ids is not None:
            mask[token_ids] = True
        self._mask = mask
        self._bytes = mask.tobytes()  # a single lookup in Python is faster here
        self.size = int(mask.sum())

    @property
    def vocab_size(self) -> int:
        """Token ids are below."""
        return len(self._mask)

    def outside(self, token_ids: Iterable[int]) -> list[int]:
        """Those that are not in the core, in their order."""
        return [token_id for token_id in token_ids if not self._bytes[token_id]]

    def outside_array(self, token_ids: NDArray[np.int32]) -> list[int]:
        """The same for an array of any shape, read row by row."""
        outside: list[int] = token_ids[~self._mask[token_ids]].tolist()
        return outside
