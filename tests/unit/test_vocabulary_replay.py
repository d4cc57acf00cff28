"""Replaying recorded drafts: what counts as accepted, and that vocabularies and priors are the engine's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.common.draft_traces import DEPTH, TARGET_TOP_K, WIDTH, Trace
from benchmarks.vocabulary.replay import Replay
from evospec.engine.config import SpeculationConfig
from evospec.engine.draft_vocab.resources import LIGHT_DRAFT_WEIGHTS

VOCAB = 1024
PROMPT, ANSWER = [5, 6, 7], list(range(600, 640))


def make_trace(prompt: list[int], right: int) -> Trace:
    """A draft whose first ``right`` tokens of each chain are the answer's, and then token 3 comes before it."""
    ids = np.zeros((len(ANSWER), DEPTH, WIDTH), np.int32)
    for row in range(len(ANSWER)):
        for depth in range(DEPTH):
            wanted = ANSWER[min(row + 1 + depth, len(ANSWER) - 1)]
            first = [wanted, 3] if depth < right else [3, wanted]
            ids[row, depth] = [*first, *(token for token in range(WIDTH + 3) if token not in first)][:WIDTH]
    logits = np.tile(np.linspace(1.0, -1.0, WIDTH).astype(np.float16), (len(ANSWER), DEPTH, 1))
    return Trace("law", prompt, ANSWER, ids, logits, np.zeros((len(ANSWER), TARGET_TOP_K), np.int32))


def replay(vocabulary: str, core: range | None = None) -> Replay:
    speculation = SpeculationConfig.model_validate({"vocabulary": vocabulary, "dynamic": {"graph": False}})
    return Replay(speculation, False, None if core is None else np.array(core), None, VOCAB, LIGHT_DRAFT_WEIGHTS)


@pytest.mark.parametrize("right", range(DEPTH + 1))
def test_a_chain_counts_up_to_its_first_wrong_token(right: int) -> None:
    drafts, accepted = replay("full").run(make_trace(PROMPT, right))
    assert drafts == len(range(1, len(ANSWER) - DEPTH, right + 1))
    assert accepted == right * drafts


def test_a_token_outside_the_vocabulary_is_not_drafted() -> None:
    assert replay("static:8", range(8)).run(make_trace(PROMPT, DEPTH))[1] == 0


def test_a_tail_takes_the_prompts_tokens_and_the_prior_what_followed_before() -> None:
    copied = make_trace([*PROMPT, *ANSWER, *PROMPT], right=1)
    drafts, accepted = replay("dynamic:8+64", range(8)).run(copied)
    assert accepted > 2 * drafts
    assert replay("dynamic:8+64", range(8)).run(make_trace(PROMPT, DEPTH))[1] == 0
