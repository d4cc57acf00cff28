"""What speculation keeps of one sequence, from its arrival to its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from evospec.engine.speculation.length.policy import Chain, Copy, Draftable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from evospec.engine.draft_vocab.snapshot import SessionSnapshot
    from evospec.engine.messages import SessionState
    from evospec.engine.online.verify_record import UnwrittenSteps

NONE = -1
"""No slot."""
TEXT_BEFORE = 16
"""Tokens of a prompt's end that come before an answer where it is kept or predicted: another one begins as it does."""
UNDECIDED = ""
"""No key."""
DraftSource = Literal["draft", "lookup"]
"""Who drafted: the draft, or prompt lookup."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who drafts for a request: the adapter in a slot, at a version; slot -1: the base draft, without key."""

    slot: int
    key: str | None
    version: int


BASE = Assignment(-1, None, 0)


@dataclass(eq=False, slots=True)
class DraftState:
    """Each field is written by the one who is named with it. At the end only slots are given back."""

    past: SessionState | None = None
    """By the engine: what the sequence's session brought along."""
    prediction: Sequence[int] = ()
    """By the engine: tokens that the client takes the output to be."""
    predicted: str = ""
    """By ``RunningTexts``: the prompt's end and the prediction, a character a token, to find words in."""
    recalled: SessionSnapshot | None = None
    """By ``SessionPast``: the session's past, once it was read; its bytes are dropped then."""
    session: int = NONE
    """By ``DraftVocab``: the slot of its vocabulary and prior. Without one it drafts from the core alone."""
    num_in_session: int = 0
    """By ``DraftVocab``: how many of its tokens its session has read."""
    text: int = NONE
    """By ``RunningTexts``: the slot in which its repeats are found."""
    num_in_text: int = 0
    """By ``RunningTexts``: how many of its tokens are there, or are left out."""
    num_entries: int = 0
    """By ``DraftKvTracker``: how many of its first tokens have an entry in the draft's KV cache."""
    source: DraftSource = "draft"
    """By the speculator: who drafted last."""
    draftable: Draftable = field(default_factory=Draftable)
    """By the speculator and its policy: what decides how many tokens are drafted."""
    copy: Copy | None = None
    """By the speculator: what may be copied in this step."""
    confidence: Sequence[int] = ()
    """By who drafts: how sure that is of each draft token of this step, a level each; empty where it does not know."""
    chain: Chain | None = None
    """By the speculator: what was drafted in this step."""
    adapter_key: str | None = UNDECIDED
    """By ``EagleAdapters``: whose adapters draft for it; None: it keeps the base draft, to compare with."""
    adapter: Assignment = BASE
    """By ``EagleAdapters``: who drafted last."""
    is_logged: bool | None = None
    """By ``VerifyLog``: whether its steps are logged; None: not decided yet."""
    unwritten: UnwrittenSteps | None = None
    """By ``VerifyLog``: its last steps that are to be logged."""
    logged_at: float = -math.inf
    """By ``RunWriter``: when (``time.monotonic``) it was logged last, with its context or after it."""
    hidden: list[NDArray[np.float32]] = field(default_factory=list)
    """By who drafts: the state [d] from which each draft token of this step was chosen, where it is kept."""

    @property
    def said(self) -> Sequence[int]:
        """The session's earlier answers."""
        return () if self.recalled is None else self.recalled.said_token_ids()

    def begin_step(self) -> None:
        """Forget what was drafted in an earlier step: whoever drafts now need not be the one who did then."""
        self.chain, self.confidence = None, ()
        self.hidden = []
