"""Recorded traces are of the answer and of the draft that is shipped."""

from __future__ import annotations

import numpy as np

from benchmarks.common.draft_traces import DEPTH, WIDTH, Trace, record, record_draft_model
from benchmarks.prompts.build import Prompt

QUESTION = "Write a Python function that returns the largest number of a list."
PROMPT = Prompt("one", "code", "train", [{"role": "user", "content": QUESTION}], QUESTION, "here", "Apache-2.0")
LENGTH = 48


def test_traces_are_of_the_greedy_answer_and_the_shipped_draft(smollm2_path: object) -> None:
    """The target's most likely tokens are the answer (bf16 may differ at near ties), and the draft guesses some."""
    (trace,) = record("smollm2-135m", [PROMPT], LENGTH)
    assert len(trace.answer) == LENGTH
    assert (trace.likely[:, 0] == trace.answer).mean() > 0.9
    assert trace.draft_ids.shape == (LENGTH, DEPTH, WIDTH)
    assert all(share > 0.3 for share in shares_right(trace, LENGTH - DEPTH))


def test_a_model_that_drafts_for_itself_is_right(smollm2_path: object) -> None:
    """At every place and depth but for near ties: a draft model's traces are in step with the answer."""
    (trace,) = record_draft_model("smollm2-135m", "smollm2-135m", [PROMPT], LENGTH)
    rows = LENGTH - DEPTH
    assert trace.draft_ids.shape == trace.draft_logits.shape == (rows + 1, DEPTH, WIDTH)
    assert trace.likely.shape[0] == LENGTH
    assert (np.diff(trace.draft_logits.astype(np.float32)) <= 0).all()
    assert all(share > 0.9 for share in shares_right(trace, rows))


def shares_right(trace: Trace, rows: int) -> list[float]:
    """Of the first tokens of drafts, by depth."""
    answer = np.array(trace.answer)
    first = trace.draft_ids[:rows, :, 0]
    return [(first[:, depth] == answer[depth + 1 : depth + 1 + rows]).mean() for depth in range(DEPTH)]
