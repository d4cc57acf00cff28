"""KV blocks that remember which prefix of which tenant each slot was computed for."""

from __future__ import annotations

from collections.abc import Sequence

Content = tuple[str, tuple[int, ...], bool]


class SimulatedKV:
    """What a real KV cache would hold: the entry of a token depends on its tenant's whole prefix up to it.

    It may depend on whether it was computed with tokens of a prompt, too.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], Content] = {}

    def write(
        self, block_ids: Sequence[int], tenant: str, token_ids: Sequence[int], start: int, as_prompt: bool = True
    ) -> None:
        """Compute positions ``start`` .. of the sequence ``token_ids``."""
        for position in range(start, len(token_ids)):
            self._slots[self._slot(block_ids, position)] = tenant, tuple(token_ids[: position + 1]), as_prompt

    def check(
        self, block_ids: Sequence[int], tenant: str, token_ids: Sequence[int], num_prompt: int | None = None
    ) -> None:
        """The blocks hold exactly these tokens' entries: computed in order, by this tenant, not overwritten.

        The first ``num_prompt`` of them as tokens of a prompt, the others not; None: all as such.
        """
        for position in range(len(token_ids)):
            as_prompt = num_prompt is None or position < num_prompt
            expected = tenant, tuple(token_ids[: position + 1]), as_prompt
            assert self._slots[self._slot(block_ids, position)] == expected

    def _slot(self, block_ids: Sequence[int], position: int) -> tuple[int, int]:
        return block_ids[position // self._block_size], position % self._block_size
