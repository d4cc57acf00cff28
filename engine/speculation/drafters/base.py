"""What a draft is: it proposes tokens, and learns from each step what it needs for that.

A draft keeps keys and values of its own in *the same block ids and block size as the target*: the slot of token t in a
sequence's blocks holds the draft's entry for token t, which depends on tokens up to t only. So preemption and the
prefix cache need no code for it. Entries that are wrong or missing cost acceptance, never an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.learner import Learner
from evospec.engine.online.verify_log import VerifyLog
from evospec.engine.online.whole_draft import WholeDraft
from evospec.engine.request import Request
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposals


class Proposer(Learner):
    """Drafts for a whole batch at once, and learns from each step what it needs for that. One thread calls all methods.

    Order within a step: ``propose`` (all decoding sequences), the target's forward pass, ``learn``, and the commit.
    """

    part = "draft"
    capture_layers: tuple[int, ...] = ()
    """The target's decoder layers whose output it wants in ``Step.features``, in ascending order."""
    stops_early: bool = False
    """Whether ``propose`` follows an ``EarlyStop``; otherwise it is given none."""
    verify_log: VerifyLog | None = None
    """Where verified drafts are to be written down."""
    whole_draft: WholeDraft | None = None
    """Whose weights it drafts with, and for whom, where those come from the worker as a whole; None: for all."""

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        """Drafts of at most ``slot.num_tokens`` tokens each, fewer where ``stop`` says so.

        Drafts with entries of their own draft for the slots whose entries are, or can be brought, up to date.
        ``slot.block_ids`` reach all known and all drafted tokens, so drafted entries have their own slots; they are
        written again before they count as a committed token's.
        """
        return {}

    def num_unread(self, request: Request) -> int:
        """Tokens to read before a decoding request's next draft, but for the few that are new with every draft."""
        return 0


@dataclass(frozen=True)
class DraftCosts:
    """Memory of a draft in bytes, known before the KV cache is sized."""

    weight_bytes: int
    """Weights of its own, not shared with the target."""
    bytes_per_block: int
    """Keys, values and whatever else it keeps for each KV block."""

    def total(self, num_blocks: int) -> int:
        """Weights and KV."""
        return self.weight_bytes + num_blocks * self.bytes_per_block


class Draft(Protocol):
    """A draft whose weights are loaded; its KV follows once the number of blocks is known."""

    description: str
    """For people: what drafts, over which vocabulary."""
    costs: DraftCosts
    vocab: DraftVocab | None
    """The vocabularies of running sequences, where they have their own."""

    def make_proposer(self, num_blocks: int) -> Proposer:
        """Allocate KV for blocks 0 .. num_blocks - 1."""
