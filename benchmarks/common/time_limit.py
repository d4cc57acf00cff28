"""To end on time, with what there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")


def bounded(items: Iterable[_Item], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[_Item]:
    """The items until another one, if it took as long as the longest before it, would end later than ``seconds``."""
    start = before = clock()
    longest = 0.0
    for item in items:
        if before - start + longest > seconds:
            return
        yield item
        now = clock()
        longest, before = max(longest, now - before), now
