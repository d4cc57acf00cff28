"""A bounded table of what followed each context, in arrays that a kernel can read as they are."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

WAYS = 8
"""Rows in which a context can live."""
_HASH = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class ContextTable:
    """Counts of (context, next token), in rows of one context each; the weakest are overwritten.

    A context is a number from 0 to 2^63 - 1. It lives in one of the ``WAYS`` rows from ``home(key)`` on; if others have
    them all, the row with the smallest sum of counts is overwritten. In a full row, the smallest count is. So a read
    looks at ``WAYS`` keys and one row of tokens, and memory is fixed. What a count of 1 is worth is up to the caller,
    who can let it grow instead of having all older counts decay.

    Single reads and writes go through flat memoryviews: a few times faster in Python than indexing numpy arrays.

    Args:
        num_rows: contexts; a power of 2, at least ``WAYS``.
        width: continuations of a context.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        if num_rows < WAYS or num_rows & (num_rows - 1):
            raise ValueError(f"a context table has a power of 2 of rows, at least {WAYS}, not {num_rows}")
        self.keys: NDArray[np.int64] = np.full(num_rows, -1, np.int64)
        """[num_rows]: the context of each row, -1 for none."""
        self.token_ids: NDArray[np.int32] = np.full((num_rows, width), -1, np.int32)
        """[num_rows, width]: what followed it, -1 for none."""
        self.counts: NDArray[np.float32] = np.zeros((num_rows, width), np.float32)
        """[num_rows, width]: how often."""
        self.width = width
        self.shift = 64 - ((num_rows // WAYS).bit_length() - 1)
        """Of a context's hash, to the number of its first row / ``WAYS``."""
        self._keys_view = self.keys.data
        self._tokens_view = self.token_ids.reshape(-1).data
        self._counts_view = cast("memoryview[float]", self.counts.reshape(-1).data)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return self.keys.nbytes + self.token_ids.nbytes + self.counts.nbytes

    def home(self, key: int) -> int:
        """The first of the rows in which a context can live."""
        return (((key * _HASH) & _MASK) >> self.shift) * WAYS

    def find(self, key: int) -> int:
        """The row of a context, -1 if it has none."""
        home = self.home(key)
        keys = self._keys_view[home : home + WAYS].tolist()
        return home + keys.index(key) if key in keys else -1

    def have(self, keys: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of some tokens [n] has followed its context."""
        homes = self._homes(keys)
        is_here = self.keys[homes[:, None] + np.arange(WAYS)] == keys[:, None]
        rows = homes + is_here.argmax(axis=1)
        followed: NDArray[np.bool_] = (self.token_ids[rows] == token_ids[:, None]).any(axis=1)
        followed &= is_here.any(axis=1)
        return followed

    def add(self, key: int, token_id: int, amount: float) -> None:
        """Count one more continuation, worth ``amount``."""
        home = self.home(key)
        keys = self._keys_view[home : home + WAYS].tolist()
        if key in keys:
            row = home + keys.index(key)
        else:
            row = home + keys.index(-1) if -1 in keys else self._overwrite_weakest(home)
            self._keys_view[row] = key
        start = row * self.width
        tokens = self._tokens_view[start : start + self.width].tolist()
        if token_id in tokens:
            self._counts_view[start + tokens.index(token_id)] += amount
            return
        if -1 in tokens:
            place = start + tokens.index(-1)
        else:
            counts = self._counts_view[start : start + self.width].tolist()
            place = start + counts.index(min(counts))
        self._tokens_view[place] = token_id
        self._counts_view[place] = amount

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self.counts *= np.float32(factor)

    def _homes(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """``home`` of many at once, [n]."""
        return (keys.astype(np.uint64) * np.uint64(_HASH) >> np.uint64(self.shift)).astype(np.int64) * WAYS

    def _overwrite_weakest(self, home: int) -> int:
        row = home + int(self.counts[home : home + WAYS].sum(axis=1).argmin())
        self.token_ids[row] = -1
        self.counts[row] = 0.0
        return row
