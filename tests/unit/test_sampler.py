"""The sampler against an independent oracle: which tokens are kept, how often each is chosen, and that
nothing but prompt, parameters, seed and logits moves a choice.

Statistical tests use fixed seeds, so they never flicker; each would fail for a perfect sampler at a rate of 1e-4.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.messages import Grammar, SamplingParams
from evospec.engine.request import Request
from evospec.engine.sampling.choose import choose_tokens
from evospec.engine.sampling.grammar_pool import GrammarPool
from evospec.engine.sampling.sampler import Sampler, SamplingRows
from evospec.kernels.gumbel_argmax import gumbel_noise
from tests.exact_distribution import distribution, edited
from tests.grammars import begin, settle
from tests.unit.chi_square import chi_square_p

FALSE_ALARM = 1e-4
EOS = 256
VOCAB = 260


class ByteTokenizer:
    """Token i is byte i; 256 is EOS, the rest padding."""

    vocab_size = VOCAB
    eos_token_ids = (EOS,)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@cache
def grammars() -> GrammarPool:
    return GrammarPool(ByteTokenizer(), num_slots=64)  # type: ignore[arg-type]  # all that it takes of one


@pytest.fixture
def sampler() -> Sampler:
    return Sampler([EOS])


def params(seed: int = 0, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1000, seed=seed, **changes)


def added(sampling: SamplingParams, prompt: Sequence[int] = (1, 2, 3), name: str = "r") -> Request:
    request = Request(
        request_id=name, client_id=b"client", tenant="tenant", sampling=sampling, prompt_token_ids=list(prompt)
    )
    if sampling.grammar is not None:
        begin(grammars(), request)
    return request


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7, "temperature": 1.4},
    "min_p": {"min_p": 0.2},
    "all three": {"top_k": 12, "top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    "penalties, bias, top_p": {
        "repetition_penalty": 0.8,
        "frequency_penalty": 0.5,
        "top_p": 0.8,
        "logit_bias": {3: 2.0},
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_choices_follow_the_exact_distribution(sampler: Sampler, name: str) -> None:
    """8,000 seeds over 30 tokens for each set of parameters."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(5)) * 1.5
    prompt, output = [0, 5, 9], [9, 11, 11, 3]
    rows = []
    for seed in range(8_000):
        request = added(params(seed, **SETTINGS[name]), prompt, name=str(seed))
        request.output_token_ids += output
        rows.append(SamplingRows(request))
    sampled = torch.tensor([s.token_ids[0] for s in sampler.sample(logits.expand(len(rows), -1), rows)])
    p = params(**SETTINGS[name])
    expected = torch.tensor(distribution(edited(logits.tolist(), p, prompt, output), p))
    assert chi_square_p(torch.bincount(sampled, minlength=30), expected) > FALSE_ALARM


@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_large_vocabulary_choice_is_the_best_of_the_kept(
    sampler: Sampler, name: str, spread: float, dtype: torch.dtype
) -> None:
    """Few or nearly all of 9,000 tokens kept; bfloat16 logits tie at the border, int8 ones by the thousand."""
    logits = (torch.randn(4, 9000, generator=torch.Generator().manual_seed(2)) * spread).to(dtype).float()
    rows = [SamplingRows(added(params(seed, **SETTINGS[name]), name=str(seed))) for seed in range(4)]
    together = sampler.sample(logits, rows)
    for seed, row in enumerate(rows):
        p = row.request.sampling
        kept = torch.tensor(distribution(logits[seed].tolist(), p)) > 0
        noise = gumbel_noise(torch.tensor([seed]), torch.tensor([3]), torch.arange(9000).unsqueeze(0))[0]
        best = (logits[seed] / p.temperature + noise).masked_fill(~kept, -torch.inf).argmax().item()
        assert together[seed].token_ids == [best]
        assert sampler.sample(logits[seed : seed + 1], [row])[0].token_ids == [best]


# --- a choice depends on nothing else ---


def model(history: Sequence[int]) -> torch.Tensor:
    """A stand-in for a model: logits as a function of the last two tokens, flat enough to be random."""
    generator = torch.Generator().manual_seed(history[-1] * 1009 + history[-2])
    logits = torch.randn(VOCAB, generator=generator) * 2
    logits[torch.tensor([32, 34, 44, 58, 97, 98, 123, 125])] += 4  # characters JSON is made of
    return logits


def rows_for(request: Request, drafts: Sequence[int]) -> torch.Tensor:
    history = request.prompt_token_ids + request.output_token_ids
    return torch.stack([model([*history, *drafts[:r]]) for r in range(1 + len(drafts))])


INVARIANCE = {
    **SETTINGS,
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "JSON": {"grammar": Grammar(kind="json_object"), "top_p": 0.9},
    "JSON, penalties, min_tokens": {"grammar": Grammar(kind="json_object"), "min_tokens": 9, "presence_penalty": 0.5},
    "min_tokens": {"min_tokens": 6, "logit_bias": {EOS: 12.0}, "stop_token_ids": (97,)},
}


def generate(sampler: Sampler, requests: list[Request], rng: random.Random | None, expected: list[list[int]]) -> None:
    """Generate 14 tokens for each request together; with ``rng``, propose drafts, right and wrong ones."""
    while unfinished := [r for r in requests if len(r.output_token_ids) < 14]:
        rows, logits = [], []
        for request in unfinished:
            right = expected[requests.index(request)][len(request.output_token_ids) :] if expected else []
            drafts = tuple(right[: rng.randint(0, 4)]) if rng else ()
            if rng and rng.random() < 0.6:
                drafts += tuple(rng.randrange(VOCAB) for _ in range(rng.randint(0, 3)))
            if request.grammar is not None:
                settle(grammars(), request.grammar, list(drafts))
                drafts = drafts[: request.grammar.num_masks - 1]
            rows.append(SamplingRows(request, drafts))
            logits.append(rows_for(request, drafts))
        for row, sampled in zip(rows, sampler.sample(torch.cat(logits), rows), strict=True):
            assert 1 <= len(sampled.token_ids) <= 1 + len(row.draft_token_ids)
            row.request.output_token_ids += sampled.token_ids
            if row.request.grammar is not None:
                row.request.grammar.commit(sampled.token_ids)


def outputs(requests: list[Request]) -> list[list[int]]:
    return [r.output_token_ids[:14] for r in requests]


@pytest.mark.parametrize("round_", range(4))
def test_drafts_and_neighbours_change_nothing(sampler: Sampler, round_: int) -> None:
    kinds = list(INVARIANCE.values())
    alone = []
    for i, kind in enumerate(kinds):
        request = added(params(round_ * 100 + i, **kind), name=f"alone {i}")
        generate(sampler, [request], None, [])
        alone += outputs([request])
    order = list(range(len(kinds)))
    rng = random.Random(round_)
    rng.shuffle(order)
    together = [added(params(round_ * 100 + i, **kinds[i]), name=f"together {i}") for i in order]
    generate(sampler, together, rng, [alone[i] for i in order])
    assert outputs(together) == [alone[i] for i in order]


def test_right_drafts_are_accepted_with_a_bonus_token(sampler: Sampler) -> None:
    request = added(params(3))
    generate(sampler, [request], None, [])
    right = request.output_token_ids
    again = added(params(3), name="again")
    [sampled] = sampler.sample(rows_for(again, right[:5]), [SamplingRows(again, tuple(right[:5]))])
    assert sampled.token_ids == right[:6]
    wrong = [*right[:2], (right[2] + 1) % VOCAB, *right[3:5]]
    [sampled] = sampler.sample(rows_for(again, wrong), [SamplingRows(again, tuple(wrong))])
    assert sampled.token_ids == right[:3]


def test_a_state_made_late_follows_the_output_before_it(sampler: Sampler) -> None:
    kind = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
    request = added(params(8, **kind))
    generate(sampler, [request], None, [])
    other = added(params(8, **kind))
    other.output_token_ids += request.output_token_ids[:6]
    generate(sampler, [other], None, [])
    assert outputs([other]) == outputs([request])


# --- single parameters ---


def test_min_tokens_counts_drafts_as_history(sampler: Sampler) -> None:
    """EOS is the favourite everywhere, but not allowed before two tokens."""
    logits = torch.zeros(3, VOCAB)
    logits[:, EOS], logits[:, 65] = 9.0, 5.0
    request = added(params(temperature=0.0, min_tokens=2))
    [sampled] = sampler.sample(logits, [SamplingRows(request, (65, 65))])
    assert sampled.token_ids == [65, 65, EOS]


def test_sampling_does_not_change_the_logits(sampler: Sampler) -> None:
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    edits = params(logit_bias={5: 3.0}, repetition_penalty=1.2, min_tokens=3, top_p=0.5)
    requests = [
        added(edits, name="a"),
        added(params(grammar=Grammar(kind="json_object")), name="b"),
    ]
    sampler.sample(logits, [SamplingRows(r) for r in requests])
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_own(sampler: Sampler) -> None:
    """Temperature, bias and penalties move the choice, never the reported log-probabilities."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    request = added(params(temperature=0.0, logit_bias={42: 100.0}, logprobs=3))
    [sampled] = sampler.sample(logits, [SamplingRows(request, (42,))])
    assert sampled.token_ids == [42, 42]
    expected = logits.double().log_softmax(1)
    for row, entry in enumerate(sampled.logprobs or []):
        assert entry.token_id == 42
        assert entry.logprob == pytest.approx(expected[row, 42].item(), abs=1e-5)
        assert [t for t, _ in entry.top] == expected[row].topk(3).indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(expected[row].topk(3).values.tolist(), abs=1e-5)
    assert len(sampled.logprobs or []) == 2


def test_logprobs_stop_where_the_tokens_stop(sampler: Sampler) -> None:
    request = added(params(temperature=0.0, logprobs=0))
    logits = torch.zeros(3, VOCAB)
    logits[:, 9] = 4.0
    [sampled] = sampler.sample(logits, [SamplingRows(request, (9, 8))])
    assert sampled.token_ids == [9, 9]
    assert [(e.token_id, e.top) for e in sampled.logprobs or []] == [(9, []), (9, [])]


@settings(max_examples=30)
@given(seed=st.integers(-(2**63), 2**64 - 1), temperature=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 2.0]))
def test_any_seed_and_temperature_choose_a_token(seed: int, temperature: float) -> None:
    sampler = Sampler([EOS])
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 30
    [sampled] = sampler.sample(logits, [SamplingRows(added(params(seed, temperature=temperature)))])
    assert 0 <= sampled.token_ids[0] < VOCAB
    if temperature < 1e-3:
        assert sampled.token_ids == [logits.argmax().item()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_own_output_only(value: float, row: int, temperature: float) -> None:
    """What comes of choosing from them must not pass for a choice, nor for a right draft."""
    sampler = Sampler([EOS])
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[:2, 65], logits[row, 99] = 1e4, value
    damaged = added(params(temperature=temperature), name="damaged")
    other = added(params(temperature=temperature), name="other")
    for draft in (0, 65, 99):
        [failed, alive] = sampler.sample(logits, [SamplingRows(damaged, (65, 65)), SamplingRows(other, (draft,))])
        assert (failed.token_ids, failed.is_finite) == ([65] * row, False)
        [alone] = sampler.sample(logits[3:], [SamplingRows(other, (draft,))])
        assert (alive.token_ids, alive.is_finite) == (alone.token_ids, True)


def test_a_grammar_outranks_min_tokens_also_at_stop_tokens() -> None:
    sampler, seven = Sampler([EOS]), ord("7")
    request = added(params(min_tokens=2, stop_token_ids=[seven], grammar=Grammar("json_schema", '{"const": 7}')))
    [sampled] = sampler.sample(torch.randn(1, VOCAB), [SamplingRows(request)])
    assert sampled.token_ids == [seven]


def test_draft_and_target_agree_as_often_as_their_distributions_allow() -> None:
    """They share the noise of a position (Daliri, Musco, Suresh, arXiv 2408.07978)."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5], [1.0, 2.0, 0.3, 0.0, -2.0]])
    count = 20_000
    params = [SamplingParams(max_tokens=1, seed=seed, temperature=0.7) for seed in range(count)]
    choices = [choose_tokens(row.expand(count, -1).contiguous(), params, [9] * count) for row in logits]
    seen = sum(a == b for a, b in zip(*choices, strict=True)) / count
    p, q = (logits.double() / 0.7).softmax(1).tolist()
    expected = sum(1 / sum(max(p[y] / p[x], q[y] / q[x]) for y in range(5)) for x in range(5))
    assert abs(seen - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
