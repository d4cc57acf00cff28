"""How often draft tokens are accepted: coupled noise (ours) against rejection sampling and a greedy draft.

``python -m benchmarks.coupling``. The target samples answers to the eval prompts; at every position the draft makes a
chain of tokens, and the target scores them. All rules (``coupling_rules``) are judged at the same positions by the same
two distributions; the draft's is cut to the candidates that the engine looks at.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.coupling_rules import COUPLED, GREEDY, REJECTION, RULES, Chain, greedy_chain, sampled_chains
from benchmarks.drafted_batch import DraftedBatch, Target, Verified, load_draft, load_target
from benchmarks.in_process import encode_chat
from benchmarks.prompts.build import Prompt
from benchmarks.speculation import DOMAINS, RESULTS, bounded, environment, short_prompts
from benchmarks.speculation_summary import ALL
from engine.loader import LoadedModel
from engine.messages import SamplingParams
from engine.sampling.choose import choose_tokens
from engine.spec.draft_head import CANDIDATES, DraftHead
from engine.spec.proposer import Draft

CHAIN = 4
WAVE = 8
"""Prompts of one domain that are answered together."""


class RecordingHead(DraftHead):
    """The full head, which keeps the logits it chose from; ``greedy``: it takes the most likely token always.

    ``candidates``: only so many of the largest logits of a row count, as in the engine (0: all).
    """

    def __init__(self, loaded: LoadedModel, candidates: int) -> None:
        super().__init__(loaded)
        self.greedy = False
        self._loaded, self._candidates = loaded, candidates
        self._logits: dict[int, list[torch.Tensor]] = {}

    def make_chain(self, *_: Any) -> None:
        """Token by token, so that every choice is seen."""

    def choose(
        self,
        hidden: torch.Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        slabs: Sequence[int] | None = None,
    ) -> list[int]:
        """As ``DraftHead``, without tails. Every sequence has a seed of its own."""
        logits = self._loaded.model.compute_logits(hidden)
        if self._candidates:
            largest = logits.topk(self._candidates, dim=1)
            logits = torch.full_like(logits, -torch.inf).scatter(1, largest.indices, largest.values)
        for row, param in zip(logits, params, strict=True):
            self._logits.setdefault(param.seed, []).append(row.clone())
        if self.greedy:
            params = [msgspec.structs.replace(param, temperature=0.0) for param in params]
        return choose_tokens(logits, params, positions, team=self._loaded.team)

    def take(self, seed: int) -> torch.Tensor:
        """[n, V] float32: the logits of a sequence's drafts since the last call."""
        return torch.stack(self._logits.pop(seed))


@dataclass(frozen=True)
class Setup:
    """Models, and the draft's head."""

    target: Target
    draft: Draft
    head: RecordingHead


def load_setup(model: str, method: str, draft: str | None, candidates: int) -> Setup:
    """Arguments as ``load_draft``'s and ``RecordingHead``'s."""
    target = load_target(model)
    heads: list[RecordingHead] = []

    def make_head(loaded: LoadedModel) -> DraftHead:
        heads.append(RecordingHead(loaded, candidates))
        return heads[0]

    return Setup(target, load_draft(target, method, draft, make_head), heads[0])


@dataclass(frozen=True)
class Sample:
    """One rule at one position of one answer: expected acceptance up to each place."""

    temperature: float
    domain: str
    prompt: str
    rule: str
    reached: list[float]


def measure(
    setup: Setup, prompts: Sequence[tuple[int, Prompt]], temperature: float, num_tokens: int
) -> Iterator[Sample]:
    """Every position in the answers to some prompts, whose numbers are their seeds."""
    by_seed = dict(prompts)
    encoded = [encode_chat(setup.target.tokenizer, prompt) for prompt in by_seed.values()]
    sampling = [SamplingParams(max_tokens=num_tokens, seed=seed, temperature=temperature) for seed in by_seed]
    for greedy in (False, True):
        setup.head.greedy = greedy
        batch = DraftedBatch(setup.target, setup.draft, encoded, sampling, CHAIN, num_tokens)
        for _ in range(num_tokens):
            for verified in batch.step():
                seed = verified.request.sampling.seed
                chains = _chains(verified, setup.head.take(seed), greedy) if verified.drafts else {}
                for rule, chain in chains.items():
                    yield Sample(temperature, by_seed[seed].domain, by_seed[seed].id, rule, chain.reached())


def _chains(verified: Verified, logits: torch.Tensor, greedy: bool) -> dict[str, Chain]:
    """By rule; nothing for a chain that is not full."""
    if len(verified.drafts) < CHAIN:
        return {}
    temperature = verified.request.sampling.temperature
    p = (verified.logits[:CHAIN].double() / temperature).softmax(1)
    if greedy:
        return {GREEDY: greedy_chain(p, verified.drafts)}
    q = (logits.double() / temperature).softmax(1)
    coupled, rejection = sampled_chains(p, q, verified.drafts, verified.choices[:CHAIN])
    return {COUPLED: coupled, REJECTION: rejection}


@dataclass(frozen=True)
class Summary:
    """A rule's means over positions. ``error``: standard error of ``length``, prompts taken as independent."""

    temperature: float
    domain: str
    rule: str
    positions: int
    reached: list[float]
    length: float
    error: float


def summarise(samples: Sequence[Sample], temperature: float, domain: str, rule: str) -> Summary | None:
    """Means over the samples of one temperature and rule, and of one domain or ``ALL``; None where there is none."""
    wanted = [s for s in samples if (s.temperature, s.rule) == (temperature, rule) and domain in (ALL, s.domain)]
    if not wanted:
        return None
    by_prompt: dict[str, list[float]] = {}
    for sample in wanted:
        by_prompt.setdefault(sample.prompt, []).append(1 + sum(sample.reached))
    length = 1 + sum(sum(sample.reached) for sample in wanted) / len(wanted)
    # Of a ratio of sums: what each prompt adds to the sum, less what its positions would at the mean.
    residuals = [sum(lengths) - length * len(lengths) for lengths in by_prompt.values()]
    error = math.sqrt(sum(residual**2 for residual in residuals)) / len(wanted)
    reached = [fmean(column) for column in zip(*(sample.reached for sample in wanted), strict=True)]
    return Summary(temperature, domain, rule, len(wanted), reached, length, error)


def table_of(title: str, summaries: Sequence[Summary]) -> Table:
    """A line a summary."""
    table = Table("temperature", "domain", "rule", title=title)
    for header in ("positions", *(f"place {place + 1}" for place in range(CHAIN)), "acceptance length"):
        table.add_column(header, justify="right")
    for s in summaries:
        numbers = [f"{value:.3f}" for value in s.reached]
        table.add_row(
            f"{s.temperature}", s.domain, s.rule, str(s.positions), *numbers, f"{s.length:.3f} ± {s.error:.3f}"
        )
        if s.rule == RULES[-1]:
            table.add_section()
    return table


def main(
    model: Annotated[str, typer.Option(help="Registry name or path.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Default: 0.7 and 1.")] = None,
    domain: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(DOMAINS)}.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each domain.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Positions of each answer.")] = 48,
    candidates: Annotated[int, typer.Option(help="Tokens that a draft is chosen among; 0: all.")] = CANDIDATES,
    minutes: Annotated[float, typer.Option(help="No prompts are begun that would end later.")] = 13.0,
    quick: Annotated[bool, typer.Option(help="Under two minutes: two prompts a domain, 12 positions.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "coupling",
) -> None:
    """Replays the three rules on the same positions, prints a table and writes a JSON file."""
    started, console = time.monotonic(), Console(width=150)
    if quick:
        prompts, max_tokens, minutes = min(prompts, 2), min(max_tokens, 12), min(minutes, 1.7)
    domains, temperatures = domain or DOMAINS, temperature or [0.7, 1.0]
    setup = load_setup(model, method, draft, candidates)
    console.print(f"[dim]{model}: {setup.draft.description}[/dim]")
    by_domain = short_prompts(model, domains)
    numbered = list(enumerate(prompt for each in domains for prompt in by_domain[each][:prompts]))
    starts = range(0, len(numbered), WAVE)
    waves = [(heat, numbered[start : start + WAVE]) for start in starts for heat in temperatures]
    samples: list[Sample] = []
    for heat, wave in bounded(waves, 60 * minutes - (time.monotonic() - started)):
        samples += measure(setup, wave, heat, max_tokens)
    wanted = [(heat, field, rule) for heat in temperatures for field in [*domains, ALL] for rule in RULES]
    summaries = [s for s in (summarise(samples, *which) for which in wanted) if s is not None]
    console.print(table_of(f"{model}, {setup.draft.description}: share of drafts accepted up to each place", summaries))
    record = {
        "environment": environment(),
        "settings": {
            "model": model,
            "draft": setup.draft.description,
            "candidates": candidates,
            "prompts": prompts,
            "max_tokens": max_tokens,
        },
        "summaries": [asdict(summary) for summary in summaries],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
