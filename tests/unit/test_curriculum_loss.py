"""The curriculum loss against its definition, written out again in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

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


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0.5, 4), st.integers(0, 1000))
@example(0.0, 1.0, 1)  # all steps weigh the same
def test_loss_is_what_the_paper_says(beta: float, temperature: float, seed: int) -> None:
    loss = CurriculumLoss(beta, temperature)(*batch(seed))
    assert loss.item() == pytest.approx(by_definition(beta, temperature, seed), rel=1e-9)


def test_later_steps_count_less_the_worse_the_first_is() -> None:
    draft, columns, target, _ = batch(2)
    mask = torch.ones(N, S, dtype=torch.bool)
    weight_of_second = []
    for boost in (0.0, 3.0, 6.0):
        good = draft.clone()
        good[:, 0].scatter_add_(-1, columns[:, 0], torch.full_like(target[:, 0], boost))
        good.requires_grad_()
        loss = CurriculumLoss(beta=1.0)(good, columns, target, mask)
        (gradient,) = torch.autograd.grad(loss, good)
        weight_of_second.append(gradient[:, 1].abs().sum().item())
    assert weight_of_second == sorted(weight_of_second)
    assert weight_of_second[0] < 0.5 * weight_of_second[2]


def test_gradient_agrees_with_finite_differences() -> None:
    """Where the first step is concerned, too: its influence on the weights is no part of the gradient."""
    draft, columns, target, mask = batch(3)
    first = draft[:, 0].log_softmax(-1).gather(-1, columns[:, 0])
    base = -(target[:, 0].softmax(-1) * first).sum(-1)

    def with_fixed_weights(logits: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        for s in range(S):
            q = logits[:, s].log_softmax(-1).gather(-1, columns[:, s])
            p = target[:, s].log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            total = total + (torch.exp(-0.3 * base * s) * kl * mask[:, s]).sum() / N
        return total

    draft.requires_grad_()
    assert torch.autograd.gradcheck(with_fixed_weights, draft)
    (expected,) = torch.autograd.grad(with_fixed_weights(draft), draft)
    (found,) = torch.autograd.grad(CurriculumLoss()(draft, columns, target, mask), draft)
    torch.testing.assert_close(found, expected)


def test_places_without_a_token_and_masked_steps_are_nothing() -> None:
    draft, columns, target, mask = batch(4)
    padded_columns = torch.cat((columns, torch.zeros(N, S, 2, dtype=torch.int64)), -1)
    padded_target = torch.cat((target, torch.full((N, S, 2), -torch.inf, dtype=target.dtype)), -1)
    noisy = draft.clone().masked_fill_(~mask[..., None], 1e4).requires_grad_()
    loss = CurriculumLoss()(noisy, padded_columns, padded_target, mask)
    assert loss.item() == pytest.approx(CurriculumLoss()(draft, columns, target, mask).item())
    (gradient,) = torch.autograd.grad(loss, noisy)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


def test_mass_outside_the_targets_tokens_counts_as_wrong() -> None:
    draft, columns, target, mask = batch(5)
    inside = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, columns, True)
    wrong = draft + torch.where(inside, 0.0, 2.0)
    assert CurriculumLoss()(wrong, columns, target, mask) > CurriculumLoss()(draft, columns, target, mask)
    only_top_k = draft.gather(-1, columns)
    own = torch.arange(K).expand(N, S, K)
    same = CurriculumLoss()(wrong.gather(-1, columns), own, target, mask)
    assert torch.equal(same, CurriculumLoss()(only_top_k, own, target, mask))
