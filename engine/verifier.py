"""The verify phase of a step: what the target chooses for each sequence, and what its output keeps of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.messages import TokenLogprob
from engine.request import Request
from engine.sampling.constrained import num_choosable
from engine.sampling.gpu_choices import GpuChoices
from engine.sampling.logprobs import PromptLogprobs
from engine.sampling.sampler import SampledSequence, Sampler, SamplingRows
from engine.step_plan import ScheduledSequence
from engine.text.tokenizer import Tokenizer
from engine.truncation import StopChecker
from engine.verification import Verification
from kernels.native import Team
from kernels.upload import upload


class Verifier:
    """Chooses tokens from the target's logits, and says which of the drafted ones are accepted.

    Args:
        tokenizer: the model's.
        max_model_len: most tokens of a sequence.
        team: threads of the compiled kernels; None where there are none.
        on_gpu: what chooses where logits are on a GPU.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, team: Team | None, on_gpu: GpuChoices | None) -> None:
        self._tokenizer, self._max_model_len = tokenizer, max_model_len
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)
        self._sampler = Sampler(self._eos_token_ids, team, on_gpu)
        self._prompt_logprobs = PromptLogprobs()
        self._stop_checkers: dict[str, StopChecker] = {}

    def add(self, request: Request) -> None:
        """A request is about to run."""
        self._stop_checkers[request.request_id] = StopChecker(
            request.sampling, request.num_tokens, self._max_model_len, self._eos_token_ids, self._tokenizer
        )

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._stop_checkers

    def __iter__(self) -> Iterator[str]:
        """Ids of all requests that were added and not forgotten."""
        return iter(self._stop_checkers)

    def verify(self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[Verification]:
        """Judge a step.

        Args:
            sequences: as scheduled.
            logits: [L, vocab] float32, the target's; of each sequence ``num_logits`` rows.
        """
        choices, verified, end = self._choose(sequences, logits), [], 0
        for sequence, choice in zip(sequences, choices, strict=True):
            request, end = sequence.request, end + sequence.num_logits
            first_row = end - sequence.num_logits + sequence.num_prompt_logits
            source = request.draft_state.source if sequence.num_draft_tokens else None
            if choice is None:
                verified.append(Verification(sequence, first_row, source=source))
                continue
            truncation = self._stop_checkers[request.request_id].push(choice.token_ids)
            kept = choice.token_ids[: truncation.num_kept]
            # The last choice is no draft, unless it is missing.
            num_accepted = min(len(choice.token_ids) - choice.is_finite, len(kept))
            verified.append(Verification(sequence, first_row, choice, truncation, kept, num_accepted, source))
        return verified

    def _choose(self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor) -> list[SampledSequence | None]:
        """The target's choices; None for sequences whose prompt is unfinished, or whose grammar's mask is late."""
        numbers = list(map(num_choosable, sequences))
        rows: list[SamplingRows] = []
        places: list[int] = []
        end = 0
        for sequence, number in zip(sequences, numbers, strict=True):
            start, end = end, end + sequence.num_logits
            if sequence.request.sampling.prompt_logprobs is not None:
                self._prompt_logprobs.collect(sequence, logits[start:end])
            if number:
                rows.append(SamplingRows(sequence.request, sequence.draft_token_ids[: number - 1]))
                first = end - sequence.num_sampled
                places += range(first, first + number)
        if not rows:
            return [None] * len(sequences)
        if len(places) < len(logits):
            logits = logits[upload(logits.device, np.array(places))[0]]
        sampled = iter(self._sampler.sample(logits, rows))
        return [next(sampled) if number else None for number in numbers]

    def take_prompt_logprobs(self, request: Request) -> list[TokenLogprob] | None:
        """Of a request's own prompt, once; None for requests that did not ask."""
        return self._prompt_logprobs.take(request)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._sampler.forget(request_id)
        self._prompt_logprobs.forget(request_id)
        self._stop_checkers.pop(request_id, None)
