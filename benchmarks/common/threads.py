"""Work beside a block of code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[threading.Event], None], count: int = 1) -> Iterator[None]:
    """``work`` in ``count`` threads until the block ends: its event is set then, and its end is waited for."""
    stopping = threading.Event()
    threads = [threading.Thread(target=work, args=(stopping,), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
