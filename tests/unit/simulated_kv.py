"""KV blocks that remember which prefix of which tenant each slot was computed for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Content = tuple[str, int, bool]


class SimulatedKV:
    """What a real KV cache would hold: the entry of a token depends on its tenant's whole prefix up to it.

    It may depend on whether it was computed with tokens of a prompt, too.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], Content] = {}
        self._prefixes: dict[tuple[int, int], int] = {}

    def write(
        self, block_ids: Sequence[int], tenant: str, token_ids: Sequence[int], start: int, as_prompt: bool = True
    ) -> None:
        """Compute positions ``start`` .. of the sequence ``token_ids``."""
        for position, prefix in enumerate(self._prefixes_of(token_ids)):
            if position >= start:
                self._slots[self._slot(block_ids, position)] = tenant, prefix, as_prompt

    def check(
        self, block_ids: Sequence[int], tenant: str, token_ids: Sequence[int], num_prompt: int | None = None
    ) -> None:
        """The blocks hold exactly these tokens' entries: computed in order, by this tenant, not overwritten.

        The first ``num_prompt`` of them as tokens of a prompt, the others not; None: all as such.
        """
        for position, prefix in enumerate(self._prefixes_of(token_ids)):
            as_prompt = num_prompt is None or position < num_prompt
            assert self._slots[self._slot(block_ids, position)] == (tenant, prefix, as_prompt)

    def _prefixes_of(self, token_ids: Sequence[int]) -> Iterator[int]:
        """A number for each prefix of a sequence, which no other prefix has: it is that of the prefix before and its
        last token."""
        prefix = 0
        for token_id in token_ids:
            prefix = self._prefixes.setdefault((prefix, token_id), len(self._prefixes) + 1)
            yield prefix

    def _slot(self, block_ids: Sequence[int], position: int) -> tuple[int, int]:
        return block_ids[position // self._block_size], position % self._block_size
