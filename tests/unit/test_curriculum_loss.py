"""The curriculum loss against its definition, written out again in plain Python."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evospec.adapters.alignment.chains import ChainStep, GoesOn
from evospec.adapters.alignment.curriculum_loss import Curriculum, divergence

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


def all_steps(draft: torch.Tensor, columns: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> list[ChainStep]:
    """Of chains of which none ends early."""
    of_steps = zip(*(each.unbind(1) for each in (draft, columns, target, mask)), strict=True)
    return [ChainStep(number, torch.arange(len(mask)), *each) for number, each in enumerate(of_steps)]


def followed(steps: list[ChainStep], goes_on: GoesOn) -> list[ChainStep]:
    """Of those chains that go on, the steps."""
    found, chains = [], steps[0].chains
    for step in steps:
        some = (each[chains] for each in (step.logits, step.columns, step.top_logits, step.mask))
        found.append(ChainStep(step.number, chains, *some))
        chains = chains[goes_on(found[-1])]
    return found


@settings(max_examples=20)
@given(st.floats(0, 1), st.floats(0.5, 4), st.integers(0, 1000))
@example(0.0, 1.0, 1)  # all steps weigh the same
def test_loss_is_what_the_paper_says(beta: float, temperature: float, seed: int) -> None:
    """In expectation: over the uniform number of each chain, of which every five-hundredth stands for all."""
    grid = 500
    steps = all_steps(*(each.repeat(grid, *[1] * (each.dim() - 1)) for each in batch(seed)))
    uniform = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).repeat_interleave(N)
    assert float(divergence(followed(steps, Curriculum(beta, uniform)), temperature)) == pytest.approx(
        by_definition(beta, temperature, seed), abs=2 / grid * by_definition(0, temperature, seed)
    )


def test_first_steps_are_all_learned_from_and_the_last_too_without_a_curriculum() -> None:
    """Whatever the numbers drawn, and where the first step has no loss at all or one that is no number."""
    draft, columns, target, mask = batch(6, torch.float32)
    for extreme in (1e9, torch.nan):
        draft[0, 0, :], draft[0, 0, columns[0, 0, 0]] = 0.0, extreme
        target[0, 0, 1:] = -torch.inf
        for uniform in (torch.zeros(N), torch.full((N,), 1 - 2**-24)):
            steps = followed(all_steps(draft, columns, target, mask), Curriculum(0.3, uniform))
            assert len(steps[0].chains) == N
            assert all(set(b.chains.tolist()) <= set(a.chains.tolist()) for a, b in pairwise(steps))
    draft[0, 0, columns[0, 0, 0]] = 1e9
    steps = followed(all_steps(draft, columns, target, mask), Curriculum(0.0, torch.full((N,), 1 - 2**-24)))
    assert len(steps[-1].chains) == N


def test_chains_are_shorter_the_worse_the_first_step_is() -> None:
    draft, columns, target, mask = batch(2)
    num_steps = []
    for boost in (0.0, 3.0, 6.0):
        good = draft.clone()
        good[:, 0].scatter_add_(-1, columns[:, 0], torch.full_like(target[:, 0], boost))
        steps, numbers = all_steps(good, columns, target, mask), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        each = [followed(steps, Curriculum(1.0, uniform.expand(N))) for uniform in numbers]
        num_steps.append(sum(len(step.chains) for found in each for step in found))
    assert num_steps == sorted(num_steps)
    assert num_steps[0] < 0.8 * num_steps[2]


def test_gradient_agrees_with_finite_differences() -> None:
    """And does not flow through the choice of chains."""
    draft, columns, target, mask = batch(3)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return divergence(all_steps(logits, columns, target, mask), 2.0)

    assert torch.autograd.gradcheck(loss, draft.requires_grad_())
    curriculum = Curriculum(0.3, torch.full((N,), 0.5, dtype=torch.float64))
    assert not curriculum(all_steps(draft, columns, target, mask)[0]).requires_grad


def test_places_without_a_token_and_masked_steps_are_nothing() -> None:
    draft, columns, target, mask = batch(4)
    padded_columns = torch.cat((columns, torch.zeros(N, S, 2, dtype=torch.int64)), -1)
    padded_target = torch.cat((target, torch.full((N, S, 2), -torch.inf, dtype=target.dtype)), -1)
    noisy = draft.clone().masked_fill_(~mask[..., None], 1e4).requires_grad_()
    loss = divergence(all_steps(noisy, padded_columns, padded_target, mask))
    assert loss.item() == pytest.approx(divergence(all_steps(draft, columns, target, mask)).item())
    (gradient,) = torch.autograd.grad(loss, noisy)
    assert gradient.isfinite().all()
    assert not gradient[~mask].any()


def test_mass_outside_the_targets_tokens_counts_as_wrong() -> None:
    draft, columns, target, mask = batch(5)
    inside = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, columns, True)
    wrong = draft + torch.where(inside, 0.0, 2.0)

    def loss(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return divergence(all_steps(logits, columns, target, mask))

    assert loss(wrong, columns) > loss(draft, columns)
    own = torch.arange(K).expand(N, S, K)
    assert torch.equal(loss(wrong.gather(-1, columns), own), loss(draft.gather(-1, columns), own))
