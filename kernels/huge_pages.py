"""Zeroed memory in huge pages, for what a step reads from beginning to end: weights and the KV cache.

In pages of 4 KiB a processor fetches ahead no further than the end of a page, and looks up where the next one lies.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

_PAGE = 2 * 2**20
_CHUNK = 16 * _PAGE
_ALIGNMENT = 64
_lock = threading.Lock()
_free = torch.empty(0, dtype=torch.uint8)
"""What is left of the chunk that small pieces are cut from."""


def huge_zeros(num_bytes: int) -> torch.Tensor:
    """uint8 zeros [num_bytes], in huge pages where the system gives them, from an address that 64 divides.

    A matrix of a small model is smaller than a huge page: such pieces lie side by side in chunks. A chunk goes when all
    of its pieces are gone.
    """
    global _free
    if num_bytes >= _CHUNK // 2:
        return _map(num_bytes)
    size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        if size > len(_free):
            _free = _map(_CHUNK)
        piece, _free = _free[:num_bytes], _free[size:]
    return piece


def _map(num_bytes: int) -> torch.Tensor:
    """Memory of its own, which begins with a huge page."""
    # Private: by default Python's anonymous maps are shared, and Linux rarely gives those huge pages.
    memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % _PAGE
    return whole[begin : begin + num_bytes]
