"""Tells the vocabularies of running sequences what the target has chosen, and what else it thought likely."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import DynamicConfig
from engine.draft_vocab.vocab import DraftVocab
from engine.request import Request
from engine.verification import Verification
from kernels.topk import topk_rows

ComputeLogits = Callable[[Sequence[int]], torch.Tensor]
"""The target's logits [n, vocab] at some of a step's tokens, counted through all sequences."""


class VocabFollower:
    """Feeds ``DraftVocab`` from steps. The target's top-k costs little: verification has computed the logits.

    Args:
        vocab: the vocabularies.
        options: how much of the target's distribution they see.
    """

    def __init__(self, vocab: DraftVocab, options: DynamicConfig) -> None:
        self.vocab = vocab
        self.top_k = options.target_top_k
        """How many of the target's most likely tokens are looked at."""
        self._num_prompt_positions = options.prefill_target_signal if vocab.has_tails else 0

    def follow(
        self,
        verified: Sequence[Verification],
        logits: torch.Tensor,
        compute_logits: ComputeLogits,
        likely: NDArray[np.int64] | None = None,
        later: Collection[str] = (),
    ) -> None:
        """A step was verified, and is not committed yet.

        Args:
            verified: all its sequences.
            logits: [L, vocab] float32, as the target has computed them; may be lost in this call.
            compute_logits: for prompt positions, whose logits nobody else wants.
            likely: ids [L, top_k] of the largest logits, best first, where they are known already.
            later: new requests that get a vocabulary when they are first drafted for; the others get one now.
        """

        def top_k(rows: Sequence[int]) -> NDArray[np.int32]:
            return self._most_likely(logits, rows) if likely is None else likely[rows].astype(np.int32)

        self.vocab.follow([one for one in verified if one.kept], top_k, later)
        if self._num_prompt_positions:
            self._follow_prompts(verified, compute_logits)

    def _follow_prompts(self, verified: Sequence[Verification], compute_logits: ComputeLogits) -> None:
        """Show the vocabularies of new sequences what the target thought likely at the ends of their prompts."""
        prompts: dict[Request, range] = {}
        token = 0
        for one in verified:
            token += len(one.sequence.token_ids)
            if one.kept and not one.request.output_token_ids:
                # The last token of a prompt may be alone in its step, and have drafts after it.
                end = token - one.sequence.num_draft_tokens - 1
                before_last = min(self._num_prompt_positions, one.sequence.num_known - 1)
                prompts[one.request] = range(end - before_last, end)
        rows = [row for of_prompt in prompts.values() for row in of_prompt]
        if not rows:
            return
        of_rows, begin = self._most_likely(compute_logits(rows)), 0
        for request, of_prompt in prompts.items():
            self.vocab.bootstrap(request, of_rows[begin : begin + len(of_prompt)])
            begin += len(of_prompt)

    def _most_likely(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> NDArray[np.int32]:
        # By this thread alone: few rows take it less time than to wake the team.
        return topk_rows(logits, self.top_k, rows=rows)[1].cpu().numpy().astype(np.int32)
