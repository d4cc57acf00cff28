"""Tells the vocabularies of running sequences what the target has chosen, and what else it thought likely."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import DynamicConfig
from engine.step_plan import ScheduledSequence
from engine.vocab.draft_vocab import DraftVocab, VerifiedSequence
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
        sequences: Sequence[ScheduledSequence],
        kept: Sequence[Sequence[int]],
        logits: torch.Tensor,
        compute_logits: ComputeLogits,
        likely: NDArray[np.int64] | None = None,
        later: Collection[str] = (),
        copied: Collection[str] = (),
    ) -> None:
        """A step was verified, and is not committed yet.

        Args:
            sequences: as scheduled.
            kept: the tokens that each one's output gets; none while its prefill is unfinished.
            logits: [L, vocab] float32, as the target has computed them; may be lost in this call.
            compute_logits: for prompt positions, whose logits nobody else wants.
            likely: ids [L, top_k] of the largest logits, best first, where they are known already.
            later: new requests that get a vocabulary when they are first drafted for; the others get one now.
            copied: requests whose drafts did not come from their vocabularies.
        """

        def top_k(rows: Sequence[range]) -> NDArray[np.int32]:
            parts = [slice(of_sequence.start, of_sequence.stop) for of_sequence in rows]
            if likely is not None:
                return np.concatenate([likely[part] for part in parts]).astype(np.int32)
            if logits.is_cuda:
                return self._most_likely(torch.cat([logits[part] for part in parts]))
            return np.concatenate([self._most_likely(logits[part]) for part in parts])

        verified = []
        prompts: dict[str, range] = {}
        row, token = 0, 0
        for sequence, token_ids in zip(sequences, kept, strict=True):
            row += sequence.num_logits
            token += len(sequence.token_ids)
            request = sequence.request
            if token_ids:
                first = row - sequence.num_sampled
                num_drafts = 0 if request.request_id in copied else sequence.num_draft_tokens
                verified.append(VerifiedSequence(request, token_ids, num_drafts, first))
                if not request.output_token_ids:
                    # The last token of a prompt may be alone in its step, and have drafts after it.
                    end = token - sequence.num_draft_tokens - 1
                    before_last = min(self._num_prompt_positions, sequence.num_known - 1)
                    prompts[request.request_id] = range(end - before_last, end)
        self.vocab.observe(verified, top_k, later)
        rows = [row for of_prompt in prompts.values() for row in of_prompt]
        if rows:
            of_rows, begin = self._most_likely(compute_logits(rows)), 0
            for request_id, of_prompt in prompts.items():
                self.vocab.bootstrap(request_id, of_rows[begin : begin + len(of_prompt)])
                begin += len(of_prompt)

    def _most_likely(self, logits: torch.Tensor) -> NDArray[np.int32]:
        # By this thread alone: a sequence's few rows take it less time than to wake the team.
        return topk_rows(logits, self.top_k)[1].int().cpu().numpy()
