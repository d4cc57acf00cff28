"""How likely a draft token is accepted, by three rules, from the distributions p of the target and q of the draft.

- *coupled* (the engine's): draft and target take the argmax of log-probability plus the same Gumbel noise; accepted
  when they agree (Daliri, Musco, Suresh, arXiv 2408.07978). Their chance of that: sum over x of 1 / sum over y of
  max(p_y / p_x, q_y / q_x), since with exponential arrivals E = exp(-noise), x is first for both exactly when
  E_y >= E_x * max(p_y / p_x, q_y / q_x) for every other y.
- *rejection*: the draft samples from q, accepted with chance min(1, p / q) (Leviathan et al., arXiv 2211.17192):
  1 - TV(p, q).
- *greedy draft*: the draft's most likely token, accepted with chance p.

Farther places of a chain condition on its own earlier drafts: coupled and rejection share chains sampled from q, a
greedy draft has its own. A place counts by the chance that all drafts before it were accepted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COUPLED, REJECTION, GREEDY = RULES = ("coupled", "rejection", "greedy draft")


def coupled_acceptance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The chance that both argmaxes agree, [N] float64; ``p`` and ``q`` [N, V] are distributions.

    For fixed x the maximum is p_y / p_x where p_y / q_y >= p_x / q_x, and q_y / q_x elsewhere: two sums over tokens in
    the order of p / q.
    """
    p, q = p.double().clamp_min(1e-300), q.double().clamp_min(1e-300)
    order = (p.log() - q.log()).argsort(dim=1, descending=True)
    p, q = p.gather(1, order), q.gather(1, order)
    above = p.cumsum(1)
    below = q.flip(1).cumsum(1).flip(1) - q
    return (1 / (above / p + below / q)).sum(1)


def rejection_acceptance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """1 - TV(p, q), [N]."""
    return torch.minimum(p, q).sum(1)


@dataclass(frozen=True)
class Chain:
    """One rule at one position. By place: the chance of acceptance there, and the weight with which a chain goes on.

    Over chains, the mean of a place's chance times the weights of all places before it is how often drafts are accepted
    up to there: the weight is the chance, or an outcome of it, for the draft token that the chain itself has.
    """

    chances: list[float]
    weights: list[float]

    def reached(self) -> list[float]:
        """Expected acceptance up to each place."""
        result, weight = [], 1.0
        for chance, own in zip(self.chances, self.weights, strict=True):
            result.append(weight * chance)
            weight *= own
        return result


def sampled_chains(
    p: torch.Tensor, q: torch.Tensor, drafts: Sequence[int], choices: Sequence[int]
) -> tuple[Chain, Chain]:
    """Coupled and rejection over one chain of sampled drafts.

    Args:
        p: [n, V], the target's distributions at the chain's places.
        q: [n, V], the draft's.
        drafts: [n], tokens drafted with the noise that the target uses.
        choices: [n], the target's tokens at these places.
    """
    agreed = [float(choice == token) for choice, token in zip(choices, drafts, strict=True)]
    columns = torch.tensor(drafts).unsqueeze(1)
    kept = (p.gather(1, columns) / q.gather(1, columns)).clamp_max(1.0).squeeze(1)
    coupled, rejection = coupled_acceptance(p, q), rejection_acceptance(p, q)
    return Chain(coupled.tolist(), agreed), Chain(rejection.tolist(), kept.tolist())


def greedy_chain(p: torch.Tensor, drafts: Sequence[int]) -> Chain:
    """A chain of the draft's most likely tokens; arguments as above."""
    chances = p.gather(1, torch.tensor(drafts).unsqueeze(1)).squeeze(1).tolist()
    return Chain(chances, chances)
