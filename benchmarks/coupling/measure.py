"""Chains of drafts at every position of sampled answers, judged by the three rules of ``benchmarks.coupling``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from benchmarks.common.drafted_batch import DraftedBatch, Target, Verified, load_draft, load_target
from benchmarks.common.in_process import encode_chat
from benchmarks.coupling.rules import COUPLED, GREEDY, REJECTION, Chain, greedy_chain, sampled_chains
from benchmarks.coupling.summary import Sample
from benchmarks.prompts.build import Prompt
from engine.loader import LoadedModel
from engine.messages import SamplingParams
from engine.sampling.choose import choose_tokens
from engine.spec.draft_head import DraftHead
from engine.spec.proposer import Draft

CHAIN = 4


class RecordingHead(DraftHead):
    """The full head, which keeps the logits it chose from; ``greedy``: it takes the most likely token always.

    ``candidates``: only so many of the largest logits of a row count, as in the engine (0: all).
    """

    def __init__(self, loaded: LoadedModel, candidates: int) -> None:
        super().__init__(loaded)
        self.greedy = False
        self._loaded, self._candidates = loaded, candidates
        self._logits: dict[int, list[torch.Tensor]] = {}

    def make_chain(self, *_: Any) -> None:
        """Token by token, so that every choice is seen."""

    def choose(
        self,
        hidden: torch.Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        slabs: Sequence[int] | None = None,
    ) -> list[int]:
        """As ``DraftHead``, without tails. Every sequence has a seed of its own."""
        logits = self._loaded.model.compute_logits(hidden)
        if self._candidates:
            largest = logits.topk(self._candidates, dim=1)
            logits = torch.full_like(logits, -torch.inf).scatter(1, largest.indices, largest.values)
        for row, param in zip(logits, params, strict=True):
            self._logits.setdefault(param.seed, []).append(row.clone())
        if self.greedy:
            params = [msgspec.structs.replace(param, temperature=0.0) for param in params]
        return choose_tokens(logits, params, positions, team=self._loaded.team)

    def take(self, seed: int) -> torch.Tensor:
        """[n, V] float32: the logits of a sequence's drafts since the last call."""
        return torch.stack(self._logits.pop(seed))


@dataclass(frozen=True)
class Setup:
    """Models, and the draft's head."""

    target: Target
    draft: Draft
    head: RecordingHead


def load_setup(model: str, method: str, draft: str | None, candidates: int) -> Setup:
    """Arguments as ``load_draft``'s and ``RecordingHead``'s."""
    target = load_target(model)
    heads: list[RecordingHead] = []

    def make_head(loaded: LoadedModel) -> DraftHead:
        heads.append(RecordingHead(loaded, candidates))
        return heads[0]

    return Setup(target, load_draft(target, method, draft, make_head), heads[0])


def measure(
    setup: Setup, prompts: Sequence[tuple[int, Prompt]], temperature: float, num_tokens: int
) -> Iterator[Sample]:
    """Every position in the answers to some prompts, whose numbers are their seeds."""
    by_seed = dict(prompts)
    encoded = [encode_chat(setup.target.tokenizer, prompt) for prompt in by_seed.values()]
    sampling = [SamplingParams(max_tokens=num_tokens, seed=seed, temperature=temperature) for seed in by_seed]
    for greedy in (False, True):
        setup.head.greedy = greedy
        batch = DraftedBatch(setup.target, setup.draft, encoded, sampling, CHAIN, num_tokens)
        for _ in range(num_tokens):
            for verified in batch.step():
                seed = verified.request.sampling.seed
                chains = _chains(verified, setup.head.take(seed), greedy) if verified.drafts else {}
                for rule, chain in chains.items():
                    yield Sample(temperature, by_seed[seed].domain, by_seed[seed].id, rule, chain.reached())


def _chains(verified: Verified, logits: torch.Tensor, greedy: bool) -> dict[str, Chain]:
    """By rule; nothing for a chain that is not full."""
    if len(verified.drafts) < CHAIN:
        return {}
    temperature = verified.request.sampling.temperature
    p = (verified.logits[:CHAIN].double() / temperature).softmax(1)
    if greedy:
        return {GREEDY: greedy_chain(p, verified.drafts)}
    q = (logits.double() / temperature).softmax(1)
    coupled, rejection = sampled_chains(p, q, verified.drafts, verified.choices[:CHAIN])
    return {COUPLED: coupled, REJECTION: rejection}
