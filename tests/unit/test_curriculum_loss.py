"""The curriculum loss against its definition, written out again in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters.chains import ChainSteps
from adapters.curriculum_loss import CurriculumLoss

N, S, R, K = 5, 4, 12, 3


def batch(
    seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft = torch.randn(N, S, R, generator=generator, dtype=dtype)
    columns = torch.stack([torch.randperm(R, generator=generator)[:K] for _ in range(N * S)]).view(N, S, K)
    target = 2 * torch.randn(N, S, K, generator=generator, dtype=dtype)
    lengths = torch.randint(1, S + 1, (N, 1), generator=generator)
    return draft, columns, target, torch.arange(S) < lengths


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def by_definition(beta: float, temperature: float, seed: int) -> float:
    draft, columns, target, mask = batch(seed)
    total = 0.0
    for n in range(N):
        first = softmax(draft[n, 0].tolist())
        wanted = softmax(target[n, 0].tolist())
        base = -sum(p * math.log(first[c]) for p, c in zip(wanted, columns[n, 0].tolist(), strict=True))
        for s in range(S):
            if not mask[n, s]:
                continue
            p = softmax([x / temperature for x in target[n, s].tolist()])
            q = softmax([x / temperature for x in draft[n, s].tolist()])
            divergence = sum(a * math.log(a / q[c]) for a, c in zip(p, columns[n, s].tolist(), strict=True))
            total += math.exp(-beta * base * s) * temperature**2 * divergence
    return total / N


def followed(
    draft: torch.Tensor, columns: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor
) -> ChainSteps:
    """The steps of chains so long."""
    step, chain = (lengths > torch.arange(S)[:, None]).nonzero(as_tuple=True)
    return ChainSteps(*(each[chain, step] for each in (draft, columns, target, mask)))


ALL = torch.full((N,), S)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 4), st.integers(0, 1000))
@example(0.0, 1.0, 1)  # all steps weigh the same
def test_loss_is_what_the_paper_says(beta: float, temperature: float, seed: int) -> None:
    """In expectation: over the uniform numbers of each chain, of which every thousandth stands for all."""
    draft, columns, target, mask = batch(seed)
    loss = CurriculumLoss(beta, temperature)
    first = ChainSteps(*(each[:, 0] for each in (draft, columns, target, mask)))
    of_steps = loss.of_steps(followed(draft, columns, target, mask, ALL)).view(S, N)
    expected = 0.0
    for uniform in (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000:
        has_step = loss.lengths(first, uniform.expand(N), S) > torch.arange(S)[:, None]
        expected += float((of_steps * has_step).sum()) / N / 1000
    all_of_it = float(of_steps.sum()) / N
    assert expected == pytest.approx(by_definition(beta, temperature, seed), abs=1e-3 * all_of_it)


def test_steps_that_a_chain_has_weigh_the_same() -> None:
    draft, columns, target, mask = batch(2)
    loss, lengths = CurriculumLoss(), torch.tensor([1, 4, 2, 3, 1])
    of_all = loss.of_steps(followed(draft, columns, target, mask, ALL)).view(S, N)
    expected = sum(float(of_all[:length, chain].sum()) for chain, length in enumerate(lengths.tolist())) / N
    assert float(loss(followed(draft, columns, target, mask, lengths), N)) == pytest.approx(expected)


def test_chains_are_shorter_the_worse_the_first_step_is() -> None:
    draft, columns, target, mask = batch(2)
    uniform = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    mean_lengths = []
    for boost in (0.0, 3.0, 6.0):
        good = draft[:, 0].scatter_add(-1, columns[:, 0], torch.full_like(target[:, 0], boost))
        first = ChainSteps(good, columns[:, 0], target[:, 0], mask[:, 0])
        lengths = [CurriculumLoss(beta=1.0).lengths(first, each.expand(N), S) for each in uniform]
        mean_lengths.append(float(torch.stack(lengths).double().mean()))
    assert mean_lengths == sorted(mean_lengths)
    assert mean_lengths[0] < 0.8 * mean_lengths[2]


def test_gradient_agrees_with_finite_differences() -> None:
    draft, columns, target, mask = batch(3)

    def of(logits: torch.Tensor) -> torch.Tensor:
        return CurriculumLoss(temperature=2.0)(followed(logits, columns, target, mask, ALL), N)

    assert torch.autograd.gradcheck(of, draft.requires_grad_())


def test_places_without_a_token_and_masked_steps_are_nothing() -> None:
    draft, columns, target, mask = batch(4)
    padded_columns = torch.cat((columns, torch.zeros(N, S, 2, dtype=torch.int64)), -1)
    padded_target = torch.cat((target, torch.full((N, S, 2), -torch.inf, dtype=target.dtype)), -1)
    noisy = draft.clone().masked_fill_(~mask[..., None], 1e4).requires_grad_()
    loss = CurriculumLoss()(followed(noisy, padded_columns, padded_target, mask, ALL), N)
    assert loss.item() == pytest.approx(CurriculumLoss()(followed(draft, columns, target, mask, ALL), N).item())
    (gradient,) = torch.autograd.grad(loss, noisy)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


def test_mass_outside_the_targets_tokens_counts_as_wrong() -> None:
    draft, columns, target, mask = batch(5)
    inside = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, columns, True)
    wrong = draft + torch.where(inside, 0.0, 2.0)

    def loss(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return CurriculumLoss()(followed(logits, columns, target, mask, ALL), N)

    assert loss(wrong, columns) > loss(draft, columns)
    own = torch.arange(K).expand(N, S, K)
    assert torch.equal(loss(wrong.gather(-1, columns), own), loss(draft.gather(-1, columns), own))
