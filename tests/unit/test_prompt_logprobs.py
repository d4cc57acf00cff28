"""Log-probabilities of a prompt, from the rows of several steps to what the server writes out."""

from __future__ import annotations

from itertools import chain

import msgspec
import torch

from evospec.engine.messages import SamplingParams, TokenLogprob
from evospec.engine.request import Request
from evospec.engine.sampling.logprobs import collect_prompt_logprobs, token_logprobs
from evospec.engine.step import ScheduledSequence
from evospec.server.generation import LOGPROB_SIZE

NUM_TOP = 20
PROMPT = torch.randint(0, 50_000, (12,), generator=torch.Generator().manual_seed(0)).tolist()
LOGITS = torch.randn(len(PROMPT), 50_000, generator=torch.Generator().manual_seed(1))


def collect(chunks: list[int]) -> list[bytes]:
    """What a request has after steps that compute so many tokens of its prompt each; 0: it is preempted."""
    request = Request("r", b"", "t", SamplingParams(max_tokens=1, seed=0, prompt_logprobs=NUM_TOP), PROMPT)
    for number in chunks:
        sequence = ScheduledSequence.of(request, number)
        start = request.num_computed_tokens
        if number:
            collect_prompt_logprobs(sequence, LOGITS[start : start + sequence.num_logits])
        request.num_computed_tokens = start + number if number else 0
    assert request.prompt_logprobs is not None
    return request.prompt_logprobs


def test_they_are_the_same_in_whatever_steps_the_prompt_is_computed() -> None:
    expected = token_logprobs(LOGITS, range(len(PROMPT) - 1), PROMPT[1:], [NUM_TOP] * (len(PROMPT) - 1))
    for chunks in ([12], [5, 7], [11, 1], [5, 3, 0, 7, 5], [1] * 12, [12, 0, 12]):
        pieces = (msgspec.msgpack.decode(piece, type=list[TokenLogprob]) for piece in collect(chunks))
        assert [*chain.from_iterable(pieces)] == expected


def test_they_take_no_more_bytes_than_they_count_for() -> None:
    """As objects those of 32,768 tokens with 20 alternatives would be 96 MB."""
    pieces = collect([12])
    assert sum(map(len, pieces)) <= LOGPROB_SIZE * (1 + NUM_TOP) * (len(PROMPT) - 1)
