"""Greedy answers with what a draft and its trainer need to know of them: recorded once, learned from many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.common.draft_traces import Head, answers, kept, load_parts
from benchmarks.prompts.build import Prompt
from evospec.adapters.alignment.chains import ChainDrafter, SegmentBatch

DEPTH, TOP_K = 4, 16
"""Draft tokens of a chain, and tokens of the target's distribution that are kept."""


@dataclass(frozen=True)
class Recording:
    """One sequence of T tokens, prompt and answer.

    ``inputs`` [T - 1, hidden] bf16: the fused features that the draft takes with each token. ``top_ids`` int32 and
    ``top_logits`` float16, both [T - 1, TOP_K]: the target's distribution of the token after it. ``drafted`` [A - 1,
    DEPTH] int32: what the base draft drafts from each token of the answer of A tokens.
    """

    prompt: list[int]
    answer: list[int]
    inputs: torch.Tensor
    top_ids: torch.Tensor
    top_logits: torch.Tensor
    drafted: torch.Tensor

    def drafts(self, drafter: ChainDrafter) -> torch.Tensor:
        """What another draft drafts [A - 1, DEPTH], as in ``drafted``; the answer's own tokens are given."""
        return _drafts(drafter, self.prompt, self.answer, self.inputs)


def drafted_right(drafted: Sequence[int], following: Sequence[int]) -> int:
    """How many drafts are right before the first that is not."""
    right = 0
    for draft, token in zip(drafted, following, strict=False):
        if draft != token:
            break
        right += 1
    return right


@torch.inference_mode()
def record(model: str, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[Recording]:
    """Answer prompts greedily, and run the shipped draft over the answers."""
    draft, target = load_parts(model)
    drafter, head = ChainDrafter(draft, target), Head(target)
    for one in answers(model, prompts, max_tokens):
        inputs = torch.zeros(len(one.features), head.hidden, dtype=torch.bfloat16)
        with drafter.precision():
            inputs[1:] = draft.fuse(one.features[:-1, : -head.hidden])
        logits, ids = head.logits(one.features).topk(TOP_K)
        drafted = _drafts(drafter, one.text, one.answer, inputs)
        yield Recording(one.text, one.answer, inputs, ids.int(), logits.half(), drafted)


def recorded(model: str, prompts: Sequence[Prompt], max_tokens: int, name: str) -> list[Recording]:
    """Answers to some prompts; from disk if they were made before under this name."""
    made = track(record(model, prompts, max_tokens), description=name, total=len(prompts))
    return kept(Path("alignment", f"{model}-{name}-{len(prompts)}x{max_tokens}.pickle"), lambda: made)


def _drafts(drafter: ChainDrafter, prompt: list[int], answer: list[int], inputs: torch.Tensor) -> torch.Tensor:
    length = len(inputs)
    token_ids = torch.zeros(1, length + DEPTH, dtype=torch.int64)
    token_ids[0, : length + 1] = torch.tensor([*prompt, *answer])
    batch = SegmentBatch(
        token_ids=token_ids,
        positions=torch.arange(length)[None],
        inputs=inputs[None],
        starts=torch.arange(len(prompt), length),
        mask=torch.ones(length - len(prompt), DEPTH, dtype=torch.bool),
        top_ids=torch.zeros(length - len(prompt), DEPTH, 1, dtype=torch.int64),
        top_logits=torch.zeros(length - len(prompt), DEPTH, 1),
        refused=torch.zeros(0, dtype=torch.int64),
    )
    steps = drafter.steps(batch, torch.arange(len(drafter.target.head)))
    return torch.stack([step.logits.argmax(-1) for step in steps], dim=1).int()
