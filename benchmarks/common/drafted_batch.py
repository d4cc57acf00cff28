"""Target and draft without the engine's loop: a batch that drafts at every position, with a draft head of one's own."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.in_process import MAX_MODEL_LEN
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.loader import LoadedModel, load
from engine.messages import SamplingParams
from engine.model_runner import ModelRunner
from engine.models import eagle3
from engine.models.config import ModelFiles
from engine.models.registry import resolve_model, validate_model_files
from engine.request import Request
from engine.sampling.choose import choose_tokens
from engine.speculation.draft_files import DRAFTS
from engine.speculation.drafters.base import Draft
from engine.speculation.drafters.draft_model import DraftModel
from engine.speculation.drafters.eagle import EagleDraft
from engine.speculation.drafters.head import DraftHead
from engine.step_plan import DraftSlot, ScheduledSequence
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Target:
    """A loaded target and all that belongs to it."""

    config: EngineConfig
    files: ModelFiles
    loaded: LoadedModel
    tokenizer: Tokenizer


def load_target(model: str) -> Target:
    """As the engine loads it."""
    config = EngineConfig(model=ModelConfig(name=model, max_model_len=MAX_MODEL_LEN))
    files = resolve_model(config.model)
    loaded = load(config, files, validate_model_files(files))
    return Target(config, files, loaded, Tokenizer.from_files(files))


def load_draft(target: Target, method: str, draft: str | None, make_head: Callable[[LoadedModel], DraftHead]) -> Draft:
    """A draft whose head ``make_head`` makes of the model whose head it is.

    Args:
        target: what is drafted for.
        method: eagle3 or draft_model.
        draft: directory or name, as ``SpeculationConfig.draft``.
        make_head: given the target for eagle3, the draft model otherwise.
    """
    cache = target.config.cache
    if method == "draft_model":
        assert draft is not None, "a draft model needs a name"
        model = target.config.model.model_copy(update={"name": draft})
        files = resolve_model(model)
        config = target.config.model_copy(update={"model": model})
        loaded = load(config, files, validate_model_files(files), target.loaded.team)
        return DraftModel(loaded, draft, cache, make_head(loaded))
    directory = DRAFTS / target.files.name if draft is None else Path(draft).expanduser()
    weights = eagle3.load_draft(directory, target.loaded.dtype, target.loaded.device)
    return EagleDraft(weights, directory.name, target.loaded, cache, make_head(target.loaded))


@dataclass(frozen=True)
class Verified:
    """A chain of draft tokens after a sequence's last token, and the target's logits.

    ``logits`` [1 + drafts, vocab] float32: row r scores the token after the first r drafts; valid until the next step.
    """

    request: Request
    position: int
    """Of the first draft."""
    drafts: list[int]
    logits: torch.Tensor
    choices: list[int]
    """The target's own token at each row."""


class DraftedBatch:
    """Sequences that draft and verify, but go on by one token a step, so that every position gets a chain.

    A sequence ends with its EOS token. While a draft has not caught up with long prompts, chains are shorter.

    Args:
        target: the target.
        draft: the draft.
        prompts: token ids.
        sampling: one for each prompt.
        num_drafts: length of a chain.
        num_steps: how often ``step`` will be called.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        prompts: Sequence[list[int]],
        sampling: Sequence[SamplingParams],
        num_drafts: int,
        num_steps: int,
    ) -> None:
        size = target.config.cache.block_size
        blocks_each = -(-(max(map(len, prompts)) + num_steps + num_drafts + 2) // size)
        self._target, self._num_drafts = target, num_drafts
        self._runner = ModelRunner(target.loaded, CacheConfig(num_blocks=blocks_each * len(prompts)))
        self._proposer = draft.make_proposer(self._runner.num_blocks)
        self._ends = frozenset(target.tokenizer.eos_token_ids)
        self._sequences: list[tuple[Request, array[int]]] = []
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            blocks = array("i", range(index * blocks_each, (index + 1) * blocks_each))
            self._sequences.append((Request(str(index), b"", "benchmark", params, prompt), blocks))
        self.propose_seconds = 0.0
        """All ``step`` calls so far: the draft's chains."""
        self.observe_seconds = 0.0
        """The same: what it learns from the verified step."""
        for request, blocks in self._sequences:
            self._verify([ScheduledSequence(request, 0, request.prompt_token_ids, 0, 0, 1, blocks)])

    def step(self) -> list[Verified]:
        """Draft, verify, and append the target's own next token; the chains of the sequences that had not ended."""
        running = [(r, blocks) for r, blocks in self._sequences if r.sampling.ignore_eos or not self._has_ended(r)]
        if not running:
            return []
        slots = [DraftSlot(request, self._num_drafts, blocks) for request, blocks in running]
        started = time.perf_counter()
        self._proposer.propose(slots)
        self.propose_seconds += time.perf_counter() - started
        steps = []
        for request, blocks in running:
            drafts = request.draft_token_ids
            tokens = [request.all_token_ids[-1], *drafts]
            steps.append(
                ScheduledSequence(request, request.num_computed_tokens, tokens, len(drafts), 0, len(tokens), blocks)
            )
        return self._verify(steps)

    def _verify(self, steps: Sequence[ScheduledSequence]) -> list[Verified]:
        logits, features = self._runner.execute(steps, self._proposer.capture_layers)
        started = time.perf_counter()
        self._proposer.after_verification(steps, [1] * len(steps), features)
        self.observe_seconds += time.perf_counter() - started
        chains = []
        end = 0
        for step in steps:
            begin, end = end, end + step.num_logits
            chain = self._verified(step, logits[begin:end])
            chains.append(chain)
            request = step.request
            request.num_computed_tokens = request.num_tokens
            request.all_token_ids.append(chain.choices[0])
            request.output_token_ids.append(chain.choices[0])
            request.draft_token_ids = []
        return chains

    def _verified(self, step: ScheduledSequence, logits: torch.Tensor) -> Verified:
        request = step.request
        positions = [request.num_tokens + row for row in range(len(logits))]
        params = [request.sampling] * len(logits)
        choices = choose_tokens(logits, params, positions, team=self._target.loaded.team)
        return Verified(request, request.num_tokens, list(request.draft_token_ids), logits, choices)

    def _has_ended(self, request: Request) -> bool:
        return bool(request.output_token_ids) and request.output_token_ids[-1] in self._ends
