"""From a draft's hidden states to draft tokens, over the whole head or a static part of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from engine.loader import CausalLM
from engine.messages import SamplingParams
from engine.models.config import ModelError
from kernels.argmax import argmax_rows
from kernels.gumbel_argmax import gumbel_argmax, seeds_tensor

COUNTS_FILE = "token_counts.safetensors"
"""Next to a draft: one tensor ``counts`` [vocab] int64, how often the target generated each token."""

_SAMPLED_CANDIDATES = 64
"""Most likely tokens among which a draft token is drawn; the target's choice is rarely outside of them."""
_MIN_TEMPERATURE = 1e-5


class DraftHead:
    """A model's output projection over all tokens or, as one contiguous slab, over some of them.

    Args:
        model: whose head it is; the full head is shared, never copied.
        token_ids: [K] int64 on the CPU, ascending: the tokens that can be drafted; None for all.
    """

    def __init__(self, model: CausalLM, token_ids: torch.Tensor | None = None) -> None:
        self._token_ids = token_ids
        self.num_bytes = 0
        """Memory of its own."""
        self._project: Callable[[torch.Tensor], torch.Tensor] = model.compute_logits
        if token_ids is not None:
            slab = model.head_slab(token_ids)
            self._project, self.num_bytes = slab.project, slab.num_bytes

    @property
    def description(self) -> str:
        return "full" if self._token_ids is None else f"static:{len(self._token_ids)}"

    def top_k(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely tokens of hidden [N, hidden].

        Returns:
            Token ids [N, k] int64 and logits [N, k] float32, in descending order of logits; fewer columns where the
            head has fewer rows.
        """
        logits = self._project(hidden)
        values, rows = logits.topk(min(k, logits.shape[1]), dim=1)
        return self._to_token_ids(rows), values

    def choose(self, hidden: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
        """One draft token for each row: argmax(logit / temperature + the target's own noise at that position).

        With the target's noise, draft and target agree as often as two distributions can without knowing of each
        other (Daliri, Musco, Suresh, arXiv 2408.07978). Penalties, bias and grammar are the target's business.

        Args:
            hidden: [N, hidden].
            params: whose temperature and seed count, one a row.
            positions: index of the chosen token in its sequence, one a row.
        """
        if all(p.temperature < _MIN_TEMPERATURE for p in params):
            rows = argmax_rows(self._project(hidden))
            return rows if self._token_ids is None else self._token_ids[rows].tolist()
        token_ids, logits = self.top_k(hidden, _SAMPLED_CANDIDATES)
        temperatures = [max(p.temperature, _MIN_TEMPERATURE) for p in params]
        scaled = logits / torch.tensor(temperatures, device=logits.device).unsqueeze(1)
        seeds = seeds_tensor([p.seed for p in params], logits.device)
        return gumbel_argmax(scaled, seeds, torch.tensor(positions, device=logits.device), token_ids).tolist()

    def _to_token_ids(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self._token_ids is None else self._token_ids.to(rows.device)[rows]


def static_vocabulary(counts: torch.Tensor, size: int, always: Collection[int]) -> torch.Tensor:
    """The ``size`` most frequent tokens, in ascending order.

    Args:
        counts: [vocab], occurrences of each token; equals go by token id.
        size: how many; at most the whole vocabulary.
        always: tokens that must be among them, such as those that end an answer.
    """
    ranked = counts.clone()
    ranked[list(always)] = torch.iinfo(counts.dtype).max
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


def read_token_counts(directory: Path, vocab_size: int) -> torch.Tensor:
    """The ``COUNTS_FILE`` of a directory: [vocab] int64.

    Raises:
        ModelError: there is none, or it is for another vocabulary.
    """
    path = directory / COUNTS_FILE
    if not path.is_file():
        raise ModelError(f"a static draft vocabulary needs token counts, but there is no {path} (evospec vocab build)")
    with safe_open(path, framework="pt") as file:
        counts: torch.Tensor = file.get_tensor("counts")
    if counts.shape != (vocab_size,):
        raise ModelError(f"{path}: counts of {counts.numel()} tokens, but the model has {vocab_size}")
    return counts
