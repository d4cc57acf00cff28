"""The mutable state of one sequence. Owned by the scheduler; imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.draft_state import DraftState
from engine.messages import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from engine.sampling.grammar_cursor import GrammarCursor


@dataclass(eq=False, slots=True)
class Request:
    """One sequence from arrival to its last token.

    Two fields are written from outside: ``draft_token_ids`` by whoever drafts, between ``Scheduler.reserve`` and
    ``Scheduler.schedule``, and ``is_stalled`` by the engine, between steps. Scheduler and KV cache manager write the
    rest.

    Raises:
        ValueError: the prompt is empty.
    """

    request_id: str
    """Unique within the scheduler."""
    client_id: bytes
    tenant: str
    sampling: SamplingParams
    prompt_token_ids: list[int]
    client_request_id: str = ""
    """What the client calls it."""
    domain: str | None = None
    """The client's name for its subject."""
    learn: bool = True
    """Whether the adapters worker may see its tokens."""
    grammar: GrammarCursor | None = None
    """Where its output stands in the grammar of its parameters."""
    draft_state: DraftState = field(default_factory=DraftState)
    """Speculation's; nobody else looks into it."""

    output_token_ids: list[int] = field(default_factory=list)
    """Committed."""
    all_token_ids: list[int] = field(init=False)
    """Prompt and output."""
    draft_token_ids: list[int] = field(default_factory=list)
    """Proposed for the step being planned or computed; emptied by its commit."""
    num_computed_tokens: int = 0
    """How many of ``all_token_ids`` have their KV in the cache."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache at first admission."""
    arrived_at: float = field(default_factory=time.monotonic)
    queue_seconds: float = 0.0
    """From its arrival to its first admission."""
    num_output_at_admission: int = 0
    """Output tokens when it was admitted last."""
    num_preemptions: int = 0
    is_stalled: bool = False
    """Whether what its grammar allows next is not known yet: until it is, the sequence computes nothing."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Prefix hashes of the first full blocks of ``all_token_ids``, as far as they were needed."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a prompt needs at least one token")
        self.all_token_ids = [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output so far."""
        return len(self.all_token_ids)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits of all prompt positions are still needed, for ``sampling.prompt_logprobs``."""
        return self.sampling.prompt_logprobs is not None and not self.output_token_ids

    @property
    def wants_embedding(self) -> bool:
        """Whether the hidden states of all prompt positions are still needed, for ``sampling.embedding``."""
        return self.sampling.embedding and not self.output_token_ids


def make_request(client_id: bytes, message: EngineRequest, vocab_size: int) -> Request:
    """What a client asks for; raises ``ValueError`` for tokens that no model could read."""
    prompt, prediction = message.prompt_token_ids, message.prediction_token_ids
    for name, tokens in (("prompt", prompt), ("prediction", prediction)):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(f"not all tokens of the {name} are below {vocab_size}")
    return Request(
        request_id=engine_request_id(client_id, message.request_id),
        client_id=client_id,
        client_request_id=message.request_id,
        tenant=message.tenant,
        prompt_token_ids=prompt,
        sampling=message.sampling,
        domain=message.session.domain or None if message.session else None,
        learn=message.learn,
        draft_state=DraftState(past=message.session, prediction=prediction),
    )


def engine_request_id(client_id: bytes, request_id: str) -> str:
    """The engine's name of a client's request: ids of different clients may be equal, these are not."""
    return f"{client_id.hex()}/{request_id}"
