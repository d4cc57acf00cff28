"""Whether a tree of drafts would beat a chain here: ``python -m benchmarks.trees``, a few minutes the first time.

From recorded greedy answers (``benchmarks.common.draft_traces``): how often the token that was right is the draft's
first, second, ... choice at each place. From those the best tree of each size, and its rate of tokens by the step costs
that the engine measures at start-up. A branch's own continuation is taken to be as good as the chain's at that depth,
and as cheap as one more token in the chain's draft step: both favour trees. Trial prompts, the draft's whole head, one
sequence.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.common.draft_traces import DEPTH, Trace, recorded
from benchmarks.common.in_process import engine_config
from benchmarks.prompts.streams import STREAM_DOMAINS
from engine.config import SpeculationConfig
from engine.core import EngineCore
from engine.models.registry import resolve_model, validate_model_files
from engine.spec.step_costs import StepCosts

RANKS = 4
"""Choices of a place that a tree may hold."""
MAX_NODES = 12


@dataclass(frozen=True)
class Shape:
    """A tree or chain of drafts: how many tokens it holds, its depth, and how many of them are accepted (mean)."""

    nodes: int
    depth: int
    accepted: float

    def tokens_per_second(self, costs: StepCosts) -> float:
        draft = costs.first_draft(1) + (self.depth - 1) * costs.next_draft(1) if self.depth else 0.0
        return (1 + self.accepted) / (costs.verify(1 + self.nodes) + draft)


def rank_shares(traces: Sequence[Trace]) -> NDArray[np.float64]:
    """[DEPTH, RANKS]: how often the answer's token is that choice of the draft, where all before it were the first."""
    hits, reached = np.zeros((DEPTH, RANKS)), np.zeros(DEPTH)
    for trace in traces:
        answer = np.array(trace.answer)
        rows = min(len(trace.draft_ids), len(answer) - DEPTH)
        alive = np.ones(max(rows, 0), bool)
        for depth in range(DEPTH):
            right = trace.draft_ids[:rows, depth, :RANKS] == answer[depth + 1 : depth + 1 + rows, None]
            reached[depth] += alive.sum()
            hits[depth] += right[alive].sum(0)
            alive &= right[:, 0]
    shares: NDArray[np.float64] = hits / reached.clip(1)[:, None]
    return shares


def best_trees(shares: NDArray[np.float64]) -> list[Shape]:
    """The best tree of 0, 1, .. ``MAX_NODES`` tokens: always the likeliest node whose parent is in it."""
    trees, accepted, depth = [Shape(0, 0, 0.0)], 0.0, 0
    waiting = [(-share, 0) for share in shares[0]]
    heapq.heapify(waiting)
    while waiting and len(trees) <= MAX_NODES:
        value, place = heapq.heappop(waiting)
        accepted, depth = accepted - value, max(depth, place + 1)
        trees.append(Shape(len(trees), depth, accepted))
        if place + 1 < DEPTH:
            for share in shares[place + 1]:
                heapq.heappush(waiting, (value * share, place + 1))
    return trees


def chains(shares: NDArray[np.float64]) -> list[Shape]:
    """Chains of 0, 1, .. ``DEPTH`` tokens."""
    return [Shape(n, n, float(np.cumprod(shares[:n, 0]).sum())) for n in range(DEPTH + 1)]


def fastest(shapes: Sequence[Shape], costs: StepCosts) -> Shape:
    """The shape with the greatest rate of tokens."""
    return max(shapes, key=lambda shape: shape.tokens_per_second(costs))


def measured_costs(model: str, vocabulary: str) -> StepCosts:
    """Of an engine with this draft vocabulary, on this machine, now."""
    config = engine_config(model, SpeculationConfig(vocabulary=vocabulary))
    files = resolve_model(config.model)
    costs = EngineCore(config, files, validate_model_files(files)).step_costs
    assert costs is not None
    return costs


def main(
    model: Annotated[str, typer.Option(help="The target; an EAGLE-3 draft is shipped for it.")] = "smollm2-135m",
    vocabulary: Annotated[str, typer.Option(help="Whose step costs are taken.")] = "static:4096",
    prompts: Annotated[int, typer.Option(min=1, help="Of each domain.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of an answer.")] = 128,
) -> None:
    """Prints, for each domain, the best chain and the best tree by tokens per second."""
    traces = recorded(model, prompts, max_tokens)
    costs = measured_costs(model, vocabulary)
    table = Table("domain", "first choice right, by place", "second", "best chain", "best tree", "tree / chain")
    for domain in STREAM_DOMAINS:
        shares = rank_shares([trace for trace in traces if trace.domain == domain])
        best = [
            max(shapes, key=lambda s: s.tokens_per_second(costs)) for shapes in (chains(shares), best_trees(shares))
        ]
        rates = [shape.tokens_per_second(costs) for shape in best]
        table.add_row(
            domain,
            *(" ".join(f"{share:.2f}" for share in shares[:, rank]) for rank in (0, 1)),
            *(
                f"{shape.nodes} tokens, {1 + shape.accepted:.2f} a step, {rate:.0f} tok/s"
                for shape, rate in zip(best, rates, strict=True)
            ),
            f"{rates[1] / rates[0]:.3f}",
        )
    console = Console(width=170)
    console.print(table)
    console.print("step costs, ms:", costs.milliseconds(range(1, MAX_NODES + 2)))


if __name__ == "__main__":
    typer.run(main)
