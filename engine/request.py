"""The mutable state of one sequence. Owned by the scheduler; imports no torch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from evospec.engine.messages import EngineRequest, SamplingParams, SessionState

if TYPE_CHECKING:
    import torch

    from evospec.engine.sampling.choose import SamplingState
    from evospec.engine.sampling.grammar_cursor import GrammarCursor
    from evospec.engine.truncation import StopChecker


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """One sequence from arrival to its last token; ``ValueError`` for an empty prompt.

    Where no other is named, scheduler and KV cache manager write. Nothing here belongs to drafting or learning: those
    keep what they know of a sequence themselves.
    """

    request_id: str
    """Unique within the scheduler."""
    client_id: bytes
    tenant: str
    sampling: SamplingParams
    prompt_token_ids: list[int]
    """Never changed: several requests may have the same list."""
    client_request_id: str = ""
    """What the client calls it."""
    domain: str | None = None
    """The client's name for its subject."""
    learn: bool = True
    """Whether the adapters worker may see its tokens."""
    is_synthetic: bool = False
    """Whether nobody waits for it: it ends as soon as a request that is not synthetic comes."""
    grammar: GrammarCursor | None = None
    """Where its output stands in the grammar of its parameters."""
    session: SessionState | None = None
    """What its session brings along."""
    prediction: Sequence[int] = ()
    """Tokens that the client takes the output to be."""
    stop_checker: StopChecker = field(init=False, repr=False)
    """By the verifier, before it is scheduled: where its output ends."""
    sampling_state: SamplingState | None = None
    """By the sampler, from its first choice on."""
    prompt_logprobs: list[bytes] | None = None
    """By the verifier: those of its prompt so far, as in ``EngineOutput``, until its first output takes them."""
    hidden_sum: torch.Tensor | None = None
    """By the model runner: [hidden] float64, of the prompt's positions so far, until the first output takes it."""

    output_token_ids: list[int] = field(default_factory=list)
    """Committed."""
    all_token_ids: list[int] = field(default_factory=list)
    """Prompt and output. Until it is admitted it may be the prompt's own list; empty: a new one is made at once."""
    num_computed_tokens: int = 0
    """How many of ``all_token_ids`` have their KV in the cache."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache at first admission."""
    arrived_at: float = field(default_factory=time.monotonic)
    queue_seconds: float = 0.0
    """From its arrival to its first admission."""
    max_kv_tokens: int = 0
    """Slots that it can come to need: for every token but the last that it may generate."""
    num_output_at_admission: int = 0
    """Output tokens when it was admitted last."""
    num_preemptions: int = 0
    is_stalled: bool = False
    """By the engine, between steps: while what its grammar allows next is not known, the sequence computes nothing."""
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    """Its KV blocks, int32 in order of position. Others may have those given back."""
    num_registered_blocks: int = 0
    """How many of them, the first, were offered to the prefix cache."""
    num_returned_blocks: int = 0
    """How many of them, the first, were given back."""
    prompt_hashes: list[bytes] = field(default_factory=list)
    """Prefix hashes of the prompt's first full blocks, as far as they were needed; shared like the prompt."""
    block_hashes: list[bytes] = field(default_factory=list)
    """The same of ``all_token_ids``."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise ValueError("a prompt needs at least one token")
        self.all_token_ids = self.all_token_ids or [*self.prompt_token_ids, *self.output_token_ids]

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


class Arrivals:
    """Makes requests of messages.

    What a tenant's last request has as well, its prompt, prediction or grammar, is not kept twice: many choices of one
    prompt arrive one by one. Tenants share nothing.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._last: WeakValueDictionary[str, Request] = WeakValueDictionary()
        """Of each tenant, while it is here."""

    def take(self, client_id: bytes, message: EngineRequest) -> Request:
        """What a client asks for; raises ``ValueError`` for tokens that no model could read."""
        last = self._last.get(message.tenant)
        prompt, sampling, hashes = message.prompt_token_ids, message.sampling, list[bytes]()
        prediction: Sequence[int] = message.prediction_token_ids
        if last is not None and prompt == last.prompt_token_ids:
            prompt, hashes = last.prompt_token_ids, last.prompt_hashes
        else:
            self._check("prompt", prompt)
        if last is not None and prediction == last.prediction:
            prediction = last.prediction
        else:
            self._check("prediction", prediction)
        if last is not None and sampling.grammar is not None and sampling.grammar == last.sampling.grammar:
            sampling = msgspec.structs.replace(sampling, grammar=last.sampling.grammar)
        request = Request(
            request_id=engine_request_id(client_id, message.request_id),
            client_id=client_id,
            client_request_id=message.request_id,
            tenant=message.tenant,
            prompt_token_ids=prompt,
            all_token_ids=prompt,
            prompt_hashes=hashes,
            sampling=sampling,
            domain=message.session.domain or None if message.session else None,
            learn=message.learn,
            is_synthetic=message.is_synthetic,
            session=message.session,
            prediction=prediction,
        )
        self._last[message.tenant] = request
        return request

    def _check(self, name: str, token_ids: Sequence[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise ValueError(f"not all tokens of the {name} are below {self._vocab_size}")


def engine_request_id(client_id: bytes, request_id: str) -> str:
    """The engine's name of a client's request: ids of different clients may be equal, these are not."""
    return f"{client_id.hex()}/{request_id}"
