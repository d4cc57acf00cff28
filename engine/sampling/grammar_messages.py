"""What the engine and a process that enforces a grammar say to each other, over a socket that keeps messages whole.

The masks themselves are not sent: the process writes them into memory that both map, ``[slots, MASKS_PER_SLOT, words]``
of 32 tokens a word. Behind them lies the ``Grammar``, in MessagePack.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from evospec.engine.config import MAX_SPECULATIVE_TOKENS

COMPILE_SECONDS = 10.0
"""Of computing, for a grammar; an ordinary schema takes a hundredth of a second."""
MASK_SECONDS = 0.5
"""Of computing, for one mask; an ordinary one takes ten microseconds."""
SPARE_SECONDS, SECONDS_PER_MASK = 0.5, 0.002
"""What a sequence may take in all: so much, and so much more for each of its masks."""
MEMORY_BYTES = 256 * 1024**2
"""What a grammar may take while it is compiled."""
MORE_MEMORY_BYTES = 64 * 1024**2
"""What it may take in addition, once it is, for its sequences."""

MASKS_PER_SLOT = MAX_SPECULATIVE_TOKENS + 1
MAX_MESSAGE_BYTES = 1 << 18


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """The tokens' bytes, by id, and those that end an output: what the process that forks is given at its start."""

    token_bytes: list[bytes]
    end_token_ids: list[int]


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """To the process that forks: with it go the new process's socket and the shared memory."""

    num_slots: int
    num_grammar_bytes: int


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """What may follow one sequence's output, and each of its draft tokens.

    ``slot`` is the sequence's own. ``committed``: tokens that its output has got since the last ask. ``number`` comes
    back in the answer. A sequence begins with ``is_new`` and ends with ``is_over``, which is not answered.
    """

    slot: int
    number: int = 0
    committed: list[int] = []
    drafts: list[int] = []
    is_new: bool = False
    is_over: bool = False


Failure = Literal["", "contradiction", "spent"]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """How many masks of a slot are right: that after the output, then one after each draft that the grammar allows.

    ``seconds`` of computing that the first of them took. With a ``failure`` there are none any more: the grammar
    refuses a token that its own mask had allowed, or the sequence has used up the time that it may take.
    """

    slot: int
    number: int
    num_masks: int
    seconds: float = 0.0
    failure: Failure = ""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The process's first message."""

    pid: int


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """Its second one: the memory that the grammar takes, or, in words fit for the client, why it cannot be enforced.

    ``is_cheap``: its masks take so little, at any place, that the engine can compute them itself.
    """

    num_bytes: int = 0
    is_cheap: bool = False
    error: str | None = None


class Answers(msgspec.Struct, frozen=True, tag="answers"):
    """Any further one."""

    answers: list[Answer]


GrammarMessage = Started | Compiled | Answers
