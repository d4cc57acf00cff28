"""The distribution that a token is to be drawn from: plain Python, one token at a time, an oracle for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evospec.engine.messages import SamplingParams


def edited(logits: Sequence[float], p: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """Logits after logit_bias and penalties."""
    out = list(logits)
    for token in range(len(out)):
        out[token] += p.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
        out[token] -= p.presence_penalty * (token in output) + p.frequency_penalty * output.count(token)
    return out


def distribution(logits: Sequence[float], p: SamplingParams) -> list[float]:
    """Probabilities after temperature, top-k, top-p and min-p, ties kept."""
    scaled = [x / p.temperature for x in logits]
    highest = max(scaled)
    weights = {i: math.exp(x - highest) for i, x in enumerate(scaled)}

    def keep(least: float) -> None:
        for token in [t for t, w in weights.items() if w < least]:
            del weights[token]

    if p.top_k:
        keep(sorted(weights.values(), reverse=True)[: p.top_k][-1])
    if p.top_p < 1:
        total, mass = sum(weights.values()), 0.0
        for weight in sorted(weights.values(), reverse=True):
            mass += weight
            if mass >= p.top_p * total:
                break
        keep(weight)
    keep(p.min_p)
    total = sum(weights.values())
    return [weights.get(i, 0.0) / total for i in range(len(logits))]
