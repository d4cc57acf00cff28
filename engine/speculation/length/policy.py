"""What decides how many tokens are drafted for each sequence of a step, how many are verified, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from evospec.engine.speculation.length.ratio import Ratio

if TYPE_CHECKING:
    from evospec.engine.speculation.length.acceptance import Tenant
    from evospec.kernels.native_chain import StopRule


class Copy(msgspec.Struct, frozen=True):
    """Tokens that may come next because the sequence's end came before. The more agreed there, the surer they are."""

    token_ids: list[int]
    levels: Sequence[int]
    """How sure each of them is."""


@dataclass(eq=False, slots=True)
class Draftable:
    """A decoding sequence, as policies see it. The same object stands for it in all steps."""

    tenant: str = ""
    limit: int = 0
    """Most tokens that may be drafted in this step, if none is copied."""
    num_unread: int = 0
    """How many of its tokens its draft has to read before it can draft."""
    greedy: bool = True
    """Whether its tokens are the most likely ones."""
    repeat: Sequence[int] = ()
    """How sure each token is that may be copied in this step, a level each; none where its end does not repeat."""
    is_copied: bool = False
    """By the policy: whether it is copied."""
    planned: int = 0
    """By the policy: how many tokens are best to draft in this step, as far as is known before it."""
    ratio: Ratio = field(default_factory=Ratio)
    """By the policy: how its drafts have fared."""
    of_tenant: Tenant | None = None
    """By the policy: how its tenant's have."""
    tenant_number: int = 0
    """By the policy: which of the step's tenants that is, for ``StopRule``."""
    acceptance: Sequence[float] = ()
    """By the policy, with a ``StopRule``: by place, how likely a draft is right, given that those before it are."""


class Chain(msgspec.Struct, frozen=True):
    """Tokens drafted for a sequence, those too that are not verified."""

    token_ids: Sequence[int]
    confidence: Sequence[int]
    """Of each token, a level; empty where it is not known."""


class LengthPolicy:
    """Decides how many tokens to draft: always as many as allowed, where a subclass does not say otherwise."""

    def drafts_for_most(self, tenant: str) -> bool:
        """Whether of late most of a tenant's sequences were drafted for: else what drafts need is made at the first."""
        return True

    def rests(self, sequences: Sequence[Draftable]) -> bool:
        """Whether the decoding sequences of a step get no drafts, whatever repeats in them."""
        return False

    def lengths(self, sequences: Sequence[Draftable], num_joining: int) -> list[int]:
        """Most draft tokens of all decoding sequences of a step, which ``num_joining`` more are about to join."""
        return [one.limit for one in sequences]

    def stop_rule(self, sequences: Sequence[Draftable], lengths: Sequence[int]) -> StopRule | None:
        """When the chains of the sequences drafted for, which have room for so many tokens, end before; None: never."""
        return None

    def worth_verifying(self, sequences: Sequence[Draftable], chains: Sequence[Chain]) -> list[int]:
        """How many tokens of each chain to verify; those without confidence are left as they are."""
        return [len(chain.token_ids) for chain in chains]

    def record_drafts(self, sequence: Draftable, chain: Chain, outcomes: Sequence[bool]) -> None:
        """What became of a chain, place by place up to the first that the target did not choose."""

    def record_copy(self, sequence: Draftable, outcomes: Sequence[bool]) -> None:
        """What became, or would have become, of what could be copied in this step."""

    def record_seconds(self, seconds: float) -> None:
        """What a step's drafts took, and what vocabularies learned of them; of the chains last cut."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """What a step without prompts took that verified so many tokens, its drafts left out."""
