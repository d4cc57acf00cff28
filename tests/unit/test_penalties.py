"""Penalties, on every path, against the definition; and that they are taken back."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.kernels import native_sampling
from evospec.kernels.penalties import SeenTokens, penalize, put_back

VOCAB_SIZE = 12
Row = tuple[list[int], list[int], tuple[float, float, float]]
"""Distinct tokens of the prompt, others, penalties; then a count for each."""


def seen_of(rows: dict[int, Row], counts: list[int]) -> SeenTokens:
    seen, left = SeenTokens(), iter(counts)
    for row, (prompt, others, penalties) in rows.items():
        token_ids = array("q", prompt + others)
        seen.add(row, penalties, len(prompt), token_ids, array("q", [next(left) for _ in token_ids]))
    return seen


def expected_logits(logits: torch.Tensor, rows: dict[int, Row], counts: list[int]) -> torch.Tensor:
    out, left = logits.clone(), iter(counts)
    for row, (prompt, others, (repetition, presence, frequency)) in rows.items():
        for token in prompt + others:
            count, x = next(left), float(logits[row, token])
            if token in prompt or count > 0:
                x = x / repetition if x > 0 else x * repetition
            out[row, token] = x - (presence + frequency * count if count > 0 else 0.0)
    return out


@st.composite
def some_rows(draw: st.DrawFn) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    for row in draw(st.lists(st.integers(0, 5), min_size=1, unique=True)):
        tokens = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), unique=True))
        cut = draw(st.integers(0, len(tokens)))
        penalties = draw(st.tuples(st.floats(0.5, 2.0), st.floats(-2, 2), st.floats(-2, 2)))
        rows[row] = tokens[:cut], tokens[cut:], penalties
    return rows


@settings(max_examples=200)
@given(rows=some_rows(), data=st.data())
def test_follows_the_definition_and_is_taken_back(rows: dict[int, Row], data: st.DataObject) -> None:
    size = sum(len(prompt) + len(others) for prompt, others, _ in rows.values())
    counts = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    logits = torch.randn(6, VOCAB_SIZE, generator=torch.Generator().manual_seed(size))
    logits[:, 0] = -torch.inf
    logits[:, 1] = 0.0
    expected, seen = expected_logits(logits, rows, counts), seen_of(rows, counts)
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(native_sampling, "can_take", lambda _: False)
            changed = logits.clone()
            before = penalize(changed, seen)
            torch.testing.assert_close(changed, expected)
            put_back(changed, seen, before)
            assert torch.equal(changed, logits)
