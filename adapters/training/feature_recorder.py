"""Keeps the target's features of every token that the engine computes: training data made while answers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batch import Features
from engine.draft_vocab.vocab import DraftVocab
from engine.speculation.drafters.base import DraftCosts, Proposer
from engine.step_plan import ScheduledSequence


class FeatureRecorder(Proposer):
    """A draft that drafts nothing and keeps the outputs of some layers. It needs an engine without prefix cache."""

    description = "feature recorder"
    costs = DraftCosts(weight_bytes=0, bytes_per_block=0)
    vocab: DraftVocab | None = None

    def __init__(self, capture_layers: tuple[int, ...]) -> None:
        self.capture_layers = capture_layers
        self._rows: dict[str, list[torch.Tensor]] = {}

    def make_proposer(self, num_blocks: int) -> Proposer:
        return self

    def after_verification(
        self, sequences: Sequence[ScheduledSequence], num_kept: Sequence[int], features: Features | None
    ) -> None:
        """Append each sequence's rows, as bf16."""
        assert features is not None
        lengths = [len(sequence.token_ids) for sequence in sequences]
        rows = torch.split_with_sizes(features.values.to("cpu", torch.bfloat16, copy=True), lengths)
        for sequence, own in zip(sequences, rows, strict=True):
            if sequence.start == 0:  # also a preempted sequence, which is computed again
                self._rows[sequence.request.request_id] = []
            self._rows[sequence.request.request_id].append(own)

    def take(self, request_id: str) -> torch.Tensor:
        """The rows of a request so far, ended or not: [tokens computed, len(capture_layers) * hidden] bf16. They are
        dropped here.
        """
        return torch.cat(self._rows.pop(request_id))
