"""All KV blocks: which are free, who shares which, and which can serve as a cached prefix."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks - 1. Every operation is O(1) per block.

    A block may carry the hash of the prefix that ends in it. It keeps that hash after its last
    user freed it, and can be found by it, until ``allocate`` needs the block for something else:
    blocks without a hash go first, then the least recently freed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks without a user, cached ones included."""
        return len(self._free)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take free blocks, each with one user; cached prefixes in them are forgotten.

        ``ValueError`` if fewer are free; nothing was changed.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            prefix_hash = self._hashes[block_id]
            if prefix_hash is not None:
                del self._block_of_hash[prefix_hash]
                self._hashes[block_id] = None
        return block_ids

    def touch(self, block_ids: Iterable[int]) -> None:
        """Add a user to each block, which may be free so far (a cached prefix that is used again)."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Take a user away from each block; those freed first are reused first, so give a sequence's tail first.

        ``ValueError`` if a block has none.
        """
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, prefix_hash: bytes) -> None:
        """Let a block in use be found by its prefix; nothing happens if another block already is."""
        if prefix_hash not in self._block_of_hash:
            self._block_of_hash[prefix_hash] = block_id
            self._hashes[block_id] = prefix_hash

    def lookup(self, prefix_hash: bytes) -> int | None:
        """The block whose prefix has this hash."""
        return self._block_of_hash.get(prefix_hash)
