"""From a draft's hidden states to draft tokens, over the whole head or a static part of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from engine.loader import LoadedModel
from engine.messages import SamplingParams
from engine.models.config import ModelError
from engine.sampling.choose import choose_tokens

COUNTS_FILE = "token_counts.safetensors"
"""Next to a draft: one tensor ``counts`` [vocab] int64, how often the target generated each token."""


class DraftHead:
    """A model's output projection over all tokens or, as one contiguous slab, over some of them.

    Args:
        loaded: whose head it is; the full head is shared, never copied.
        token_ids: [K] int64 on the CPU, ascending: the tokens that can be drafted; None for all.
    """

    def __init__(self, loaded: LoadedModel, token_ids: torch.Tensor | None = None) -> None:
        self._team = loaded.team
        self._token_ids: torch.Tensor | None = None
        self.num_bytes = 0
        """Memory of its own."""
        self._project: Callable[[torch.Tensor], torch.Tensor] = loaded.model.compute_logits
        if token_ids is not None:
            slab = loaded.model.head_slab(token_ids)
            self._token_ids = token_ids.to(loaded.device, torch.int32)
            self._project, self.num_bytes = slab.project, slab.num_bytes

    @property
    def description(self) -> str:
        """The vocabulary as it is configured."""
        return "full" if self._token_ids is None else f"static:{len(self._token_ids)}"

    def choose(self, hidden: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
        """One draft token for each row, by the target's rule and with the target's own noise at that position.

        With that noise, draft and target agree as often as two distributions can without knowing of each other
        (Daliri, Musco, Suresh, arXiv 2408.07978). Penalties, bias and grammar are the target's business.

        Args:
            hidden: [N, hidden], as the model's ``compute_logits`` takes it.
            params: one a row.
            positions: index of the chosen token in its sequence, one a row.
        """
        return choose_tokens(self._project(hidden), params, positions, self._token_ids, self._team)


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
