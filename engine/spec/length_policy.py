"""What decides how many tokens are drafted for each sequence of a step, and how many of them are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.spec.stop_rule import StopRule


@dataclass(frozen=True, slots=True)
class Repeat:
    """A sequence whose end came before: how sure each token is that may be copied from there, a level each."""

    levels: Sequence[int]
    greedy: bool
    """Whether the sequence's tokens are the most likely ones."""


class Draftable(NamedTuple):
    """A tenant's decoding sequence of a step, for which at most ``limit`` tokens may be drafted.

    ``num_unread``: how many of its tokens its draft has to read before it can draft; ``repeat``: what may be copied.
    """

    request_id: str
    tenant: str
    limit: int
    num_unread: int = 0
    repeat: Repeat | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """Tokens drafted for a sequence, those too that are not verified."""

    token_ids: Sequence[int]
    sureness: Sequence[int]
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
        """How many tokens of each chain to verify; those without sureness are left as they are."""
        ...

    def observe(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        """What became of a chain, place by place up to the first that the target did not choose."""
        ...

    def observe_repeat(self, request_id: str, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of a copy."""
        ...

    def observe_seconds(self, seconds: float) -> None:
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

    def observe(self, request_id: str, chain: Chain, outcomes: Sequence[bool], repeat: Repeat | None) -> None:
        pass

    def observe_repeat(self, request_id: str, repeat: Repeat, outcomes: Sequence[bool]) -> None:
        pass

    def observe_seconds(self, seconds: float) -> None:
        pass

    def forget(self, request_id: str) -> None:
        pass
