"""The verify phase of a step: what the target chooses for each sequence, and what its output keeps of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from evospec.engine.request import Request
from evospec.engine.sampling.constrained import num_choosable
from evospec.engine.sampling.gpu_choices import GpuChoices
from evospec.engine.sampling.logprobs import collect_prompt_logprobs
from evospec.engine.sampling.sampler import Sampler, SamplingRows
from evospec.engine.step import SampledSequence, ScheduledSequence, Verification
from evospec.engine.text.tokenizer import Tokenizer
from evospec.engine.truncation import StopChecker
from evospec.kernels.native import Team
from evospec.kernels.upload import upload


class Verifier:
    """Chooses tokens from the target's logits, and says which of the drafted ones are accepted.

    ``team`` and ``on_gpu``: as for ``Sampler``.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, team: Team | None, on_gpu: GpuChoices | None) -> None:
        self._token_bytes, self._max_model_len = tokenizer.token_bytes, max_model_len
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._sampler = Sampler(self._eos_token_ids, team, on_gpu)

    def add(self, request: Request) -> None:
        """A request is about to run."""
        request.stop_checker = StopChecker(
            request.sampling, request.num_tokens, self._max_model_len, self._eos_token_ids, self._token_bytes
        )

    def verify(self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[Verification]:
        """Judge a step. ``logits``: [L, vocab] float32, the target's; of each sequence ``num_logits`` rows."""
        numbers = list(map(num_choosable, sequences))
        first_rows: list[int] = []
        rows: list[SamplingRows] = []
        end = 0
        for sequence, number in zip(sequences, numbers, strict=True):
            request, start, end = sequence.request, end, end + sequence.num_logits
            first_rows.append(start + sequence.num_prompt_logits)
            if request.wants_prompt_logits:
                collect_prompt_logprobs(sequence, logits[start:end])
            if number:
                rows.append(SamplingRows(request, sequence.draft_token_ids[: number - 1]))
        if rows and sum(numbers) < logits.shape[0]:
            chosen = zip(first_rows, numbers, strict=True)
            places = np.array([row for first, number in chosen for row in range(first, first + number)])
            logits = logits[upload(logits.device, places)[0]]
        if not rows and logits.is_cuda:
            # Else nobody waits for such a step; the scheduler learns from its time how much of prompts one may have.
            torch.cuda.current_stream().synchronize()
        sampled = iter(self._sampler.sample(logits, rows) if rows else ())
        choices = [next(sampled) if number else None for number in numbers]
        return list(map(_judge, sequences, first_rows, choices))


def _judge(sequence: ScheduledSequence, first_row: int, choice: SampledSequence | None) -> Verification:
    """What is kept of a sequence's choices; None: its prompt is unfinished, or its grammar's mask is late."""
    request = sequence.request
    if choice is None:
        return Verification(sequence, first_row)
    truncation = request.stop_checker.push(choice.token_ids)
    kept = choice.token_ids[: truncation.num_kept]
    # The last choice is no draft, unless it is missing.
    num_accepted = min(len(choice.token_ids) - choice.is_finite, len(kept))
    return Verification(sequence, first_row, choice, truncation, kept, num_accepted)
