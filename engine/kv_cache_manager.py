"""Which KV blocks hold which request's tokens, and which prefixes requests can share. Block ids only, no tensors."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

from evospec.engine.block_pool import BlockPool
from evospec.engine.request import Request

DIGEST_BYTES = 16


def tenant_root(tenant: str) -> bytes:
    """The hash before a tenant's first block."""
    return blake2b(tenant.encode(), digest_size=DIGEST_BYTES, person=b"tenant").digest()


def hash_block(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of the prefix that ends with a full block: BLAKE2b-128 over the hash before it and its tokens as int32.

    A hit is trusted without comparing tokens, so a collision would show one prompt's KV to another
    request. The hash is therefore a cryptographic one. A chain starts from its tenant's root, so for a
    block of another tenant's somebody would have to find a second preimage (2^128 trials); two prefixes
    meet by chance only after about 2^64 blocks. Every input after the root has a fixed length, so no two
    different chains are the same bytes.
    """
    return blake2b(previous + array("i", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


class KVCacheManager:
    """Gives blocks to requests and keeps the prefix cache.

    Only full blocks of committed tokens whose KV is computed enter the prefix cache, found by a
    chain of hashes that begins with the tenant's name: tenants never share blocks. Synthetic requests neither take
    blocks from it nor leave any there.

    Where nobody reads more than the last ``window`` tokens, blocks of those before are given back; None: all are read.

    With ``reads_prompts_apart`` a token of a prompt has another KV, by its rounding, than if it was decoded. Then only
    blocks of prompts enter the prefix cache, and only for prompts: no KV depends on what is found there.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        window: int | None = None,
        reads_prompts_apart: bool = False,
    ) -> None:
        self.block_size = block_size
        self._window = window
        self.prefix_caching = prefix_caching
        self._reads_prompts_apart = reads_prompts_apart
        self._pool = BlockPool(num_blocks)
        self._used_by: Counter[str] = Counter()

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._pool.num_blocks - self._pool.num_free

    def num_blocks_used_by(self, tenant: str) -> int:
        """Blocks that the tenant's requests hold; one that several of them share counts once."""
        return self._used_by[tenant]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def num_slots(self, request: Request) -> int:
        """Tokens that the request's blocks can hold."""
        return len(request.block_ids) * self.block_size

    def can_grow(self, request: Request) -> bool:
        """Whether the request has a whole block beyond those of its known tokens: drafts were given one."""
        return len(request.block_ids) > self.num_blocks_for(request.num_tokens)

    def cached_blocks(self, request: Request) -> list[int]:
        """The blocks of the request's first tokens that the prefix cache has, for ``allocate``.

        At least the last token is left, since its logits are needed; all, if the whole prompt's are.
        """
        is_alone = request.is_synthetic or request.wants_prompt_logits or request.wants_embedding
        if not self.prefix_caching or is_alone:
            return []
        num_usable = self._sharable_blocks(request, len(request.all_token_ids) - 1)
        self._extend_hashes(request, num_usable)
        block_ids: list[int] = []
        for prefix_hash in request.block_hashes[:num_usable]:
            block_id = self._pool.lookup(prefix_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_new_blocks(self, request: Request) -> int:
        """Blocks that would come into use if ``allocate`` gave a request without any those for its known tokens."""
        cached = self.cached_blocks(request)
        return self.num_blocks_for(request.num_tokens) - len(cached) + self._num_unused(cached)

    def allocate(self, request: Request, num_tokens_total: int, keep_free: int = 0, cached: Sequence[int] = ()) -> bool:
        """Give the request blocks for its first ``num_tokens_total`` tokens, and leave ``keep_free`` blocks free.

        ``cached``: of a request without blocks, those that ``cached_blocks`` has found since blocks were given last.
        False if there are too few free blocks; nothing was changed.
        """
        if num_tokens_total <= len(request.block_ids) * self.block_size:
            return True
        missing = max(self.num_blocks_for(num_tokens_total) - len(request.block_ids) - len(cached), 0)
        num_new = missing + self._num_unused(cached)
        if num_new > self._pool.num_free - keep_free:
            return False
        self._pool.touch(cached)
        request.block_ids.extend([*cached, *self._pool.allocate(missing)])
        request.num_registered_blocks += len(cached)
        self._used_by[request.tenant] += num_new
        return True

    def after_commit(self, request: Request) -> None:
        """Offer the blocks filled by computed tokens to later requests, and give back those that it reads no more."""
        num_full = request.num_computed_tokens // self.block_size
        if num_full > request.num_registered_blocks and self.prefix_caching and not request.is_synthetic:
            self._register(request)
        if self._window is None:
            return
        first_read = request.num_computed_tokens - self._window + 1  # by the next token
        num_returned = max(first_read // self.block_size, request.num_returned_blocks)
        self._release(request.tenant, request.block_ids[request.num_returned_blocks : num_returned])
        request.num_returned_blocks = num_returned

    def num_computable(self, request: Request) -> int:
        """Tokens of a request that can be computed in its next step: all that are left, or those of its prompt."""
        num_prompt, num_computed = len(request.prompt_token_ids), request.num_computed_tokens
        end = num_prompt if self._reads_prompts_apart and num_computed < num_prompt else request.num_tokens
        return end - num_computed

    def _register(self, request: Request) -> None:
        num_full = self._sharable_blocks(request, request.num_computed_tokens)
        if num_full <= request.num_registered_blocks:
            return
        self._extend_hashes(request, num_full)
        for index in range(request.num_registered_blocks, num_full):
            self._pool.register(request.block_ids[index], request.block_hashes[index])
        request.num_registered_blocks = num_full

    def trim(self, request: Request) -> None:
        """Take back blocks past the request's known tokens: they held rejected drafts."""
        needed = self.num_blocks_for(len(request.all_token_ids))
        self._release(request.tenant, request.block_ids[needed:])
        del request.block_ids[needed:]

    def free(self, request: Request) -> None:
        """Take back all blocks of a request, if it has any. Its last block is the first to be reused."""
        self._release(request.tenant, request.block_ids[request.num_returned_blocks :])
        request.block_ids = array("i")
        request.num_registered_blocks = request.num_returned_blocks = 0

    def _release(self, tenant: str, block_ids: Sequence[int]) -> None:
        before = self._pool.num_free
        self._pool.free(reversed(block_ids))
        self._used_by[tenant] -= self._pool.num_free - before

    def _num_unused(self, block_ids: Sequence[int]) -> int:
        return sum(self._pool.ref_count(block_id) == 0 for block_id in block_ids)

    def _sharable_blocks(self, request: Request, num_tokens: int) -> int:
        """Full blocks of its first ``num_tokens`` tokens that a request may take from others, or offer them."""
        most = len(request.prompt_token_ids) if self._reads_prompts_apart else num_tokens
        return min(num_tokens, most) // self.block_size

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        """Those of the prompt for all requests that share it, the others for this one."""
        num_of_prompt = min(len(request.prompt_token_ids) // self.block_size, num_blocks)
        self._extend(request.prompt_hashes, request, num_of_prompt)
        request.block_hashes += request.prompt_hashes[len(request.block_hashes) : num_blocks]
        self._extend(request.block_hashes, request, num_blocks)

    def _extend(self, hashes: list[bytes], request: Request, num_blocks: int) -> None:
        size = self.block_size
        for index in range(len(hashes), num_blocks):
            previous = hashes[-1] if hashes else tenant_root(request.tenant)
            hashes.append(hash_block(previous, request.all_token_ids[index * size : (index + 1) * size]))
