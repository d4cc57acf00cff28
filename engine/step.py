"""The values that flow through one step of the engine, in the order in which they are made."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from evospec.engine.messages import StepTimings, TokenLogprob
from evospec.engine.request import Request
from evospec.engine.truncation import Truncation
from evospec.kernels.topk import topk_rows_on_host

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from evospec.engine.batch import Features
    from evospec.kernels.native import Team

DraftSource = Literal["draft", "lookup"]
"""Who drafted: the draft, or prompt lookup."""


class Decodes(msgspec.Struct, frozen=True):
    """The sequences that decode in the step being planned: each lacks the KV of its last token only."""

    requests: list[Request]
    limits: list[int]
    """Of each: how many tokens may be drafted for it at most, by its length."""
    num_joining: int
    """So many more sequences decode soon: their prompts are computed now or next."""


class DraftSlot(msgspec.Struct, frozen=True):
    """A decoding sequence's room for draft tokens."""

    request: Request
    num_tokens: int
    """Most tokens to draft; may be 0."""
    block_ids: array[int]
    """All blocks of the sequence, int32 in order of position; they hold its known tokens and ``num_tokens`` more."""


class Copy(msgspec.Struct, frozen=True):
    """Tokens that may come next because the sequence's end came before. The more agreed there, the surer they are."""

    token_ids: list[int]
    levels: Sequence[int]
    """How sure each of them is."""
    predicted: Sequence[bool] = ()
    """Of each, whether the client's prediction goes on with it, too; empty without one."""


class Proposal(msgspec.Struct, eq=False):
    """Draft tokens of one sequence. Whoever drafts fills it in; after that nobody changes it."""

    token_ids: list[int] = []
    """To be verified."""
    source: DraftSource = "draft"
    drafted: Sequence[int] = ()
    """All that were drafted; ``token_ids`` are the first of them, those that are worth verifying."""
    confidence: Sequence[int] = ()
    """Of each drafted token, how sure the draft is of it, a level each; empty where that is not known."""
    hidden: list[NDArray[np.float32]] = []
    """The state [d] from which each token was chosen, where it is kept."""
    version: int = 0
    """Of the adapter that drafted; 0: the base draft."""
    predicted: Sequence[bool] = ()
    """Of each token that was copied, whether the client's prediction goes on with it, too; empty without one."""
    copy: Copy | None = None
    """What could be copied in place of the draft's tokens."""

    @property
    def is_copied(self) -> bool:
        """Whether the tokens were copied in place of the draft's."""
        return self.source == "lookup" and self.copy is not None


NOTHING = Proposal()
Proposals = Mapping[Request, Proposal]
"""By sequence; who has none gets no drafts."""


class ScheduledSequence(msgspec.Struct, frozen=True):
    """One sequence's share of a step: ``token_ids`` at positions ``start``, ``start + 1``, ...

    The last ``num_logits`` of these rows have their logits computed: first ``num_prompt_logits`` rows
    for ``sampling.prompt_logprobs``, then ``num_sampled`` rows: once the sequence is computed to its
    end, that of its last known token and one for each draft token. Prompt rows begin at ``start``, the
    row at position p scores prompt token p + 1; a prompt preempted before its first output token is
    computed again from position 0, and its rows are given again.
    """

    request: Request
    start: int
    token_ids: list[int]
    num_draft_tokens: int
    """How many of ``token_ids`` are drafts; they come last."""
    num_prompt_logits: int
    num_logits: int
    block_ids: array[int]
    """All blocks of the sequence, int32 in order of position, including those for this step; valid until its commit."""
    proposal: Proposal = msgspec.field(default_factory=Proposal)
    """Where its drafts are from."""

    @classmethod
    def of(cls, request: Request, num_tokens: int, proposal: Proposal = NOTHING) -> ScheduledSequence:
        """The next ``num_tokens`` of a request, its drafts after those that it has."""
        known, start = request.all_token_ids, request.num_computed_tokens
        token_ids = known[start : start + num_tokens]
        end, num_drafts = start + len(token_ids), num_tokens - len(token_ids)
        if num_drafts:
            token_ids += proposal.token_ids
        num_prompt_logits = 0
        if request.wants_prompt_logits:
            num_prompt_logits = min(end, len(request.prompt_token_ids) - 1) - start
        num_sampled = 1 + num_drafts if end == len(known) else 0
        num_logits = num_prompt_logits + num_sampled
        return cls(request, start, token_ids, num_drafts, num_prompt_logits, num_logits, request.block_ids, proposal)

    @property
    def num_sampled(self) -> int:
        """Rows from which tokens are chosen, after the prompt's: 0 while prefill is unfinished."""
        return self.num_logits - self.num_prompt_logits

    @property
    def decodes(self) -> bool:
        """Whether no token of its prompt is computed."""
        return self.start >= len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens before the drafts."""
        return len(self.token_ids) - self.num_draft_tokens

    @property
    def draft_token_ids(self) -> list[int]:
        return self.token_ids[len(self.token_ids) - self.num_draft_tokens :]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step computes. ``preempted`` lost their blocks while it was planned, and wait again."""

    sequences: list[ScheduledSequence]
    num_tokens: int
    num_prompt_tokens: int
    """How many of them are of prompts, or of sequences that are computed again."""
    preempted: list[Request]


class SampledSequence(msgspec.Struct, frozen=True):
    """Accepted drafts, then one recovered or bonus token; logprobs where the request asks for them.

    ``is_finite`` False: one of the logits of the next choice is NaN or +inf, so nothing can be chosen; the last token
    is missing.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    is_finite: bool = True


class Verification(msgspec.Struct, frozen=True):
    """What a step has decided about one sequence, before the commit."""

    sequence: ScheduledSequence
    first_row: int
    """The first of the sequence's rows of logits that tokens are chosen from; the rows of its drafts follow."""
    choice: SampledSequence | None = None
    """The target's choices; None while the prompt is unfinished, or where a grammar's mask is late."""
    truncation: Truncation | None = None
    """Where the output ends among them; None without choices."""
    kept: list[int] = []
    """The tokens that the output gets: accepted drafts, then a recovered or bonus token, as far as it goes on."""
    num_accepted: int = 0
    """How many of them were drafted."""

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def source(self) -> DraftSource | None:
        """Who drafted the tokens that were verified; None: nothing was drafted."""
        return self.sequence.proposal.source if self.sequence.num_draft_tokens else None

    @property
    def rows(self) -> range:
        """The rows of logits from which the kept tokens were chosen."""
        return range(self.first_row, self.first_row + len(self.kept))

    @property
    def num_chosen(self) -> int:
        """The target's choices, also those after the output's end."""
        return 0 if self.choice is None else len(self.choice.token_ids)

    @property
    def num_predicted(self) -> int:
        """How many of the accepted tokens were copied, and the client's prediction goes on with them, too."""
        return sum(self.sequence.proposal.predicted[: self.num_accepted])

    def outcomes(self, drafts: Sequence[int]) -> list[bool]:
        """Whether each of some draft tokens is what the target chose, up to the first that is not.

        The last choice judges the first draft that was not verified, too: to leave one out costs no knowledge.
        """
        outcomes = [draft == token_id for draft, token_id in zip(drafts, self.kept, strict=False)]
        return outcomes[: outcomes.index(False) + 1] if False in outcomes else outcomes


@dataclass(eq=False, slots=True)
class Step:
    """A verified step, for those who learn from it; it is not committed yet."""

    batch: Batch
    verified: list[Verification]
    """Of all its sequences."""
    logits: torch.Tensor
    """[L, vocab] float32, the target's, as it has computed them."""
    features: Features | None
    """Of all its tokens, where the draft wants them. On CUDA valid in this step only; on a CPU never overwritten."""
    _known: tuple[dict[int, int], NDArray[np.float32], NDArray[np.int32]] | None = field(default=None, init=False)
    """What ``top_k`` has found last: the place of each row, logits and ids."""

    def top_k(
        self, rows: Sequence[int], k: int, team: Team | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The ``k`` most likely tokens at some rows of the logits, best first: their logits and ids, [n, k] each.

        What was asked for last is kept: who asks for a part of it waits for nothing. ``team``: threads that help. For
        few rows it takes the calling one less time than to wake them.
        """
        known = self._known
        if known is None or known[1].shape[1] < k or not known[0].keys() >= set(rows):
            values, columns = topk_rows_on_host(self.logits, k, team, rows)
            ids = columns.astype(np.int32)
            self._known = {row: place for place, row in enumerate(rows)}, values, ids
            return values, ids
        places = [known[0][row] for row in rows]
        return known[1][places, :k], known[2][places, :k]


class StepClock:
    """Measures a step from its beginning on, part after part."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """A part of the step ends; a part may come more than once."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def __getitem__(self, part: str) -> float:
        """Seconds of a part so far."""
        return self._seconds.get(part, 0.0)

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return sum(self._seconds.values())

    @property
    def speculation(self) -> float:
        """Seconds that proposing and learning took so far: what a step without drafts would not have."""
        return self.seconds - sum(self[part] for part in ("schedule", "forward", "sample", "commit"))

    def timings(self, batch: Batch) -> StepTimings:
        """The step is over."""
        return StepTimings(
            schedule=self["schedule"],
            forward=self["forward"],
            sample=self["sample"],
            commit=self["commit"],
            num_tokens=batch.num_tokens,
            num_sequences=len(batch.sequences),
            draft=self.speculation,
            vocabulary=self["vocabulary"],
        )
