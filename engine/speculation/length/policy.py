"""What decides how many tokens are drafted for each sequence of a step, how many are verified, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray


class Repeat(msgspec.Struct, frozen=True):
    """A sequence whose end came before: how sure each token is that may be copied from there, a level each."""

    levels: Sequence[int]
    greedy: bool
    """Whether the sequence's tokens are the most likely ones."""


class Draftable(msgspec.Struct, frozen=True):
    """A tenant's decoding sequence of a step, for which at most ``limit`` tokens may be drafted.

    ``num_unread``: how many of its tokens its draft has to read before it can draft; ``repeat``: what may be copied.
    """

    request_id: str
    tenant: str
    limit: int
    num_unread: int = 0
    repeat: Repeat | None = None


class Chain(msgspec.Struct, frozen=True):
    """Tokens drafted for a sequence, those too that are not verified."""

    token_ids: Sequence[int]
    confidence: Sequence[int]
    """Of each token, a level; empty where it is not known."""
    greedy: bool
    """Whether the sequence's tokens are the most likely ones."""
    copied: bool = False


@dataclass(frozen=True)
class DraftLengths:
    """Most draft tokens of each sequence, and the sequences for which they are copied."""

    most: list[int]
    copied: frozenset[str] = frozenset()


class LengthPolicy(Protocol):
    """Decides how many tokens to draft."""

    def drafts_for_most(self, tenant: str) -> bool:
        """Whether of late most of a tenant's sequences were drafted for: else what drafts need is made at the first."""
        ...

    def rests(self, request_ids: Sequence[str], num_joining: int) -> bool:
        """Whether the decoding sequences of a step get no drafts, whatever repeats in them."""
        ...

    def lengths(self, sequences: Sequence[Draftable], num_joining: int) -> DraftLengths:
        """For all decoding sequences of a step, which ``num_joining`` more are about to join."""
        ...

    def stop_rule(self, lengths: Mapping[str, int]) -> StopRule | None:
        """When the chains of the sequences drafted for, which have room for so many tokens, end before; None: never."""
        ...

    def worth_verifying(self, chains: Mapping[str, Chain]) -> Mapping[str, int]:
        """How many tokens of each chain to verify; those without confidence are left as they are."""
        ...

    def record_drafts(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        """What became of a chain, place by place up to the first that the target did not choose."""
        ...

    def record_copy(self, request_id: str, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of a copy."""
        ...

    def record_seconds(self, seconds: float) -> None:
        """What a step's drafts took, and what vocabularies learned of them; of the chains last cut."""
        ...

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        ...


class FixedLength:
    """Always as many tokens as allowed."""

    def drafts_for_most(self, tenant: str) -> bool:
        return True

    def rests(self, request_ids: Sequence[str], num_joining: int) -> bool:
        return False

    def lengths(self, sequences: Sequence[Draftable], num_joining: int) -> DraftLengths:
        return DraftLengths([one.limit for one in sequences])

    def stop_rule(self, lengths: Mapping[str, int]) -> StopRule | None:
        return None

    def worth_verifying(self, chains: Mapping[str, Chain]) -> Mapping[str, int]:
        return {request_id: len(chain.token_ids) for request_id, chain in chains.items()}

    def record_drafts(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        pass

    def record_copy(self, request_id: str, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        pass

    def record_seconds(self, seconds: float) -> None:
        pass

    def forget(self, request_id: str) -> None:
        pass


Confidence = Mapping[str, Sequence[int]]
"""Of the sequences whose draft knows it: how sure it is of each token that it has drafted, a level each."""


@dataclass(frozen=True)
class StopRule:
    """All chains end where another token of each promises less than it costs.

    A sequence's next draft promises the chance that it and all before it are accepted. Costs are seconds times the rate
    of tokens that the step promises: what could be had for them otherwise.
    """

    chances: NDArray[np.float32]
    """[T, 2, CONFIDENCE_LEVELS]: chance of a tenant's greedy and sampled token, by the draft's confidence."""
    tenants: Mapping[str, int]
    """The number of each sequence's tenant among the T."""
    acceptance: Mapping[str, Sequence[float]]
    """Of each sequence by place, before it is drafted, given that those before it are accepted."""
    verify_costs: Sequence[float]
    """By place: of verifying one more token."""
    draft_cost: float
    """Of the batch's next draft tokens."""
    planned: Mapping[str, int]
    """Length for each sequence that is best on average, for drafts that know nothing of how sure they are."""
