"""Logits of which only the largest are computed from the head itself (kernels/screened_head.py)."""

from __future__ import annotations

from collections.abc import Sequence

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from evospec.engine.messages import SamplingParams
from evospec.engine.sampling.choose import takes_largest_logit
from evospec.kernels.native import MatrixPart, PackedMatrix, Team, linear
from evospec.kernels.screened_head import ScreenedHead, is_worth_it

VOCAB, HIDDEN = 5000, 256


def head_of(weights: torch.Tensor, is_quantised: bool, bias: torch.Tensor | None, digits: int) -> PackedMatrix:
    (vocab, hidden), rows = weights.shape, np.arange(len(weights))
    part = MatrixPart(rows, values=weights)
    if is_quantised:
        kind = GGMLQuantizationType.Q8_0
        part = MatrixPart(rows, int(kind), blocks=gguf.quants.quantize(weights.numpy(), kind))
    return PackedMatrix(vocab, hidden, [part], bias, digits)


def near_ties() -> torch.Tensor:
    """Tokens in groups of fifty that hardly differ, so that estimates put nearly all of them in a wrong order."""
    centers = torch.randn(VOCAB // 50, HIDDEN).repeat_interleave(50, dim=0)
    return centers + 0.01 * torch.randn(VOCAB, HIDDEN)


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("is_quantised", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_largest_logit_is_the_heads_own_to_the_bit(
    digits: int, is_quantised: bool, has_bias: bool, threads: int
) -> None:
    torch.manual_seed(0)
    team = Team(threads)
    head = head_of(near_ties(), is_quantised, torch.randn(VOCAB) if has_bias else None, digits)
    screened = ScreenedHead(team, head)
    hidden = torch.randn(96, HIDDEN).bfloat16()
    hidden[:, 7] *= 40  # as hidden states of real models have it
    for rows in torch.split(hidden, [1, 2, 5, 8, 16, 64]):
        expected = linear(team, head, rows)
        logits = screened.logits(rows, torch.full_like(expected, torch.nan))
        assert torch.equal(logits.argmax(dim=1), expected.argmax(dim=1))
        assert torch.equal(logits.amax(dim=1), expected.amax(dim=1))
        assert (logits != expected).float().mean() > 0.5  # most are estimates


def test_equal_logits_are_all_computed() -> None:
    torch.manual_seed(1)
    team, weights = Team(2), torch.randn(VOCAB, HIDDEN)
    weights[4321] = weights[1234] = weights[17] * 2
    screened = ScreenedHead(team, head_of(weights, True, None, 1))
    logits = screened.logits(weights[17:18].bfloat16(), torch.empty(1, VOCAB))
    assert logits[0, 1234] == logits[0, 4321] == logits.max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_so(value: float) -> None:
    team = Team(2)
    screened = ScreenedHead(team, head_of(torch.randn(VOCAB, HIDDEN), False, None, 1))
    hidden = torch.randn(2, HIDDEN).bfloat16()
    hidden[1, 3] = value
    finite = screened.logits(hidden, torch.empty(2, VOCAB)).isfinite().all(dim=1)
    assert finite.tolist() == [True, False]


def test_small_heads_and_those_of_few_bits_are_not_copied() -> None:
    assert not is_worth_it(head_of(torch.randn(VOCAB, HIDDEN), True, None, 1))
    assert is_worth_it(head_of(torch.randn(16 * VOCAB, HIDDEN), True, None, 1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], True),
        ([("temperature", 1.0)], False),
        ([("logprobs", 0)], False),
        ([("prompt_logprobs", 0)], False),
        ([("presence_penalty", 0.5)], False),
        ([("repetition_penalty", 1.1)], False),
        ([("logit_bias", {5: 1.0})], False),
        ([("min_tokens", 3)], False),
        ([("grammar", "root ::= [0-9]")], False),
    ],
)
def test_requests_that_need_other_logits_get_them(changes: Sequence[tuple[str, object]], expected: bool) -> None:
    params = SamplingParams(**{"max_tokens": 8, "seed": 0, "temperature": 0.0, **dict(changes)})  # type: ignore[arg-type]
    assert takes_largest_logit(params) is expected
