"""Recorded traces are of the answer and of the draft that is shipped."""

from __future__ import annotations

import numpy as np

from benchmarks.common.draft_traces import DEPTH, WIDTH, record
from benchmarks.prompts.build import Prompt


def test_traces_are_of_the_greedy_answer_and_the_shipped_draft(smollm2_path: object) -> None:
    """The target's most likely tokens are the answer (bf16 may differ at near ties), and the draft guesses some."""
    question = "Write a Python function that returns the largest number of a list."
    prompt = Prompt("one", "code", "train", [{"role": "user", "content": question}], question, "here", "Apache-2.0")
    (trace,) = record("smollm2-135m", [prompt], 48)
    answer = np.array(trace.answer)
    assert len(answer) == 48
    assert (trace.likely[:48, 0] == answer).mean() > 0.9
    rows = len(answer) - DEPTH
    assert trace.draft_ids.shape == (len(answer), DEPTH, WIDTH)
    for depth in range(DEPTH):
        assert (trace.draft_ids[:rows, depth, 0] == answer[depth + 1 : depth + 1 + rows]).mean() > 0.3
