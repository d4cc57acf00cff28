"""What the worker adds to a draft's logits for the prior, against the engine's prior itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evospec.adapters.alignment.chains import SegmentBatch, collate
from evospec.adapters.alignment.records import Segment
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import DraftStep, TokenRows
from evospec.kernels.session_options import NUM_FEATURES, SessionOptions
from tests.drifting_traffic import DriftingTraffic, TinyDraft
from tests.unit.test_replay import segment

VOCAB = 12
HORIZON = 4
EVERY = torch.arange(VOCAB)
LIGHT = [0.5, 0.5, 1.0, 0.0, 1.5]
texts = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60)


def weights_at(position: int) -> list[float]:
    """Others at each position."""
    return [(0.25 + 0.125 * (position % 5)) * weight for weight in LIGHT]


def with_prior(text: list[int], *, is_served: bool = True) -> Segment:
    """A segment whose chains begin at every position of its second half."""
    n = len(text)
    weights = torch.tensor([weights_at(position) for position in range(n)], dtype=torch.float16)
    return dataclasses.replace(
        segment("r", n), token_ids=torch.tensor(text), anchors=torch.arange(n) >= n // 2, prior=weights * is_served
    )


def bonus(batch: SegmentBatch, step: int, token_ids: torch.Tensor = EVERY) -> torch.Tensor:
    """[N, R] of all chains."""
    if batch.prior is None:
        return torch.zeros(len(batch.starts), len(token_ids))
    return batch.prior.bonus(batch.starts // batch.length, batch.starts % batch.length, step, token_ids)


def none_repeats(_rows: NDArray[np.int32], _token_ids: NDArray[np.int32]) -> torch.Tensor:
    raise AssertionError("all tokens are candidates already")


def as_served(text: list[int], weights: list[float], drafts: list[int]) -> torch.Tensor:
    """[VOCAB]: what the engine adds, a session having had a text, to what may follow its drafts."""
    session, index = Sessions(SessionOptions(1, 0), np.full(VOCAB, True)), Texts(1, 256)
    session.clear(0, weights)
    session.begin(0, text, [], [])
    index.clear(0)
    rows = TokenRows()
    rows.add(0, text)
    index.extend(rows)
    step, every = DraftStep([0], [0]), EVERY.int()[None]
    for number in range(len(drafts) + 1):
        scores = torch.zeros(1, VOCAB)
        step.go_on([drafts[:number]], every, scores)
        session.score(index, step, none_repeats)
    return scores[0]


@settings(max_examples=100)
@given(st.lists(texts, min_size=1, max_size=3))
def test_a_chain_begins_with_the_prior_that_the_engine_applies(of_segments: list[list[int]]) -> None:
    batch = collate([with_prior(text) for text in of_segments], HORIZON)
    for start, found in zip(batch.starts.tolist(), bonus(batch, 0), strict=True):
        row, at = divmod(start, batch.positions.shape[1])
        expected = as_served(of_segments[row][: at + 1], weights_at(at), [])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_later_steps_follow_the_text() -> None:
    """The engine looks up a draft's n-grams in the text before it; the worker has the right drafts in the text."""
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    batch = collate([with_prior(text)], HORIZON)
    chain = batch.starts.tolist().index(6)
    for step in range(HORIZON):
        found, expected = bonus(batch, step)[chain], as_served(text[:7], weights_at(6), text[7 : 7 + step])
        assert found.argmax() == expected.argmax() == text[step + 1]
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


def test_what_a_gap_separates_has_not_followed() -> None:
    text = [1, 2, 3, 4, 1, 2, 5, 1, 2]
    one = with_prior(text)
    missing = dataclasses.replace(one, positions=one.positions + 10 * (torch.arange(len(text)) >= 6))
    whole, gap = (bonus(collate([each], HORIZON), 0)[-1] for each in (one, missing))
    weights = weights_at(8)
    torch.testing.assert_close(whole, as_served(text, weights, []), atol=2e-3, rtol=2e-3)
    assert whole[5] > gap[5]
    torch.testing.assert_close(gap[5], torch.tensor(weights[0]), atol=2e-3, rtol=2e-3)  # the text has it, that is all
    torch.testing.assert_close(whole[3], gap[3], atol=2e-3, rtol=2e-3)


def test_tokens_that_nobody_asks_for_are_left_out() -> None:
    batch = collate([with_prior([1, 2, 3, 1, 2, 3, 1])], HORIZON)
    some = torch.tensor([0, 2, 11])
    for step in range(HORIZON):
        assert torch.equal(bonus(batch, step)[:, some], bonus(batch, step, some))
    assert set(batch.wanted_ids.tolist()) >= {1, 2, 3}


def test_without_a_prior_nothing_is_added() -> None:
    batch = collate([with_prior([1, 2, 3, 1, 2, 3, 1], is_served=False)], HORIZON)
    assert batch.prior is None
    assert not bonus(batch, 0).any()


def test_chains_say_what_the_draft_says_with_the_prior(tmp_path: Path) -> None:
    tiny = TinyDraft.make(tmp_path)
    plain = DriftingTraffic(tiny.drafter).answers(1)[0].segment()
    plain = dataclasses.replace(plain, token_ids=plain.token_ids[torch.arange(len(plain.token_ids)) % 7])
    served = dataclasses.replace(plain, prior=torch.ones(len(plain.token_ids), NUM_FEATURES, dtype=torch.float16))
    batches = [collate([each], HORIZON) for each in (plain, served)]
    every = torch.arange(len(tiny.drafter.target.head))
    for without, having in zip(*(tiny.drafter.steps(batch, every) for batch in batches), strict=True):
        more = having.logits - without.logits
        assert (more > 0.5).any(dim=1).all()
        torch.testing.assert_close(more, bonus(batches[1], having.number, every), atol=1e-4, rtol=1e-4)
