"""Where a draft step's time goes: ``python -m benchmarks.step_share``, by rows of the draft's head and batch size.

The engine's own draft networks and heads, on real prompts; vocabularies take turns, a few steps each. ``head`` is the
projection with the choice of a token, ``layer`` the rest of ``propose`` (network, batch layout), both for each draft
token, which are drafted one by one here; ``observe`` is what a verified step costs the draft.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.in_process import MAX_MODEL_LEN
from benchmarks.common.machine import write_record
from benchmarks.prompts.sets import mixed_prompts
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig
from evospec.engine.loader import LoadedModel, load
from evospec.engine.messages import SamplingParams
from evospec.engine.model_runner import ModelRunner
from evospec.engine.models import eagle3
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.request import Request
from evospec.engine.sampling.choose import choose_tokens
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.speculation.drafters.base import Draft
from evospec.engine.speculation.drafters.draft_model import DraftModel
from evospec.engine.speculation.drafters.eagle import EagleDraft
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.step import NOTHING, Batch, DraftSlot, ScheduledSequence, Step, Verification
from evospec.engine.text.tokenizer import Tokenizer

ROWS = (0, 32768, 8192, 2048)
"""0: all."""
CHAIN = 4
WARMUP_STEPS = 3
_Item = TypeVar("_Item")


class TimedHead(DraftHead):
    """A head over the first ``rows`` tokens (0: all) that adds up its time."""

    def __init__(self, loaded: LoadedModel, rows: int) -> None:
        super().__init__(loaded, torch.arange(rows) if rows else None)
        self.seconds = 0.0

    def make_chain(self, *_: Any) -> None:
        """Token by token: a chain in one call has no parts to time."""

    def choose(self, *arguments: Any, **keywords: Any) -> list[int]:
        started = time.perf_counter()
        choices = super().choose(*arguments, **keywords)
        self.seconds += time.perf_counter() - started
        return choices


@dataclass(frozen=True)
class Split:
    """Medians over rounds, in seconds: of one draft token of the whole batch, and of observing one step."""

    rows: int
    batch: int
    head: float
    layer: float
    observe: float

    @property
    def head_share(self) -> float:
        return self.head / (self.head + self.layer)


@dataclass(frozen=True)
class Target:
    config: EngineConfig
    files: ModelFiles
    loaded: LoadedModel
    tokenizer: Tokenizer


def load_target(model: str) -> Target:
    config = EngineConfig(model=ModelConfig(name=model, max_model_len=MAX_MODEL_LEN))
    files = resolve_model(config.model)
    loaded = load(config, files, validate_model_files(files))
    return Target(config, files, loaded, Tokenizer.from_files(files))


def load_draft(target: Target, method: str, draft: str | None, rows: int) -> tuple[Draft, TimedHead]:
    """A draft, and its head of ``rows`` tokens (0: all); ``draft`` is as in ``SpeculationConfig``."""
    cache = target.config.cache
    if method == "draft_model":
        assert draft is not None, "a draft model needs a name"
        model = target.config.model.model_copy(update={"name": draft})
        files = resolve_model(model)
        config = target.config.model_copy(update={"model": model})
        loaded = load(config, files, validate_model_files(files), target.loaded.team)
        head = TimedHead(loaded, rows)
        return DraftModel(loaded, draft, cache, head), head
    directory = DRAFTS / target.files.name if draft is None else Path(draft).expanduser()
    weights = eagle3.load_draft(directory, target.loaded.dtype, target.loaded.device)
    head = TimedHead(target.loaded, rows)
    return EagleDraft(weights, directory.name, target.loaded, cache, head), head


class Bench:
    """Sequences that draft and verify, but go on by one token a step, so that every position gets a chain.

    While a draft has not caught up with long prompts, chains are shorter. ``num_steps``: how many are taken at most.
    """

    def __init__(
        self, target: Target, draft: Draft, head: TimedHead, prompts: Sequence[list[int]], num_steps: int
    ) -> None:
        blocks_each = -(-(max(map(len, prompts)) + num_steps + CHAIN + 2) // target.config.cache.block_size)
        self._team, self._head = target.loaded.team, head
        self._runner = ModelRunner(target.loaded, CacheConfig(num_blocks=blocks_each * len(prompts)))
        self._proposer = draft.make_proposer(self._runner.num_blocks)
        self._propose_seconds = self._observe_seconds = 0.0
        self._requests: list[Request] = []
        sampling = SamplingParams(max_tokens=num_steps, seed=0, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            blocks = array("i", range(index * blocks_each, (index + 1) * blocks_each))
            self._requests.append(Request(str(index), b"", "benchmark", sampling, prompt, block_ids=blocks))
        for request in self._requests:
            self._verify([ScheduledSequence.of(request, request.num_tokens)])

    def measure(self, steps: int) -> tuple[float, float, float]:
        """Seconds of (head, layer) for each draft token, and of observing a step."""
        head, propose, observe = self._head.seconds, self._propose_seconds, self._observe_seconds
        for _ in range(steps):
            self._step()
        tokens = steps * CHAIN
        head, propose = self._head.seconds - head, self._propose_seconds - propose
        return head / tokens, (propose - head) / tokens, (self._observe_seconds - observe) / steps

    def _step(self) -> None:
        """Draft, verify, and append the target's own next token."""
        started = time.perf_counter()
        proposals = self._proposer.propose([DraftSlot(one, CHAIN, one.block_ids) for one in self._requests])
        self._propose_seconds += time.perf_counter() - started
        drafted = [(request, proposals.get(request, NOTHING)) for request in self._requests]
        self._verify([ScheduledSequence.of(one, 1 + len(drafts.token_ids), drafts) for one, drafts in drafted])

    def _verify(self, steps: Sequence[ScheduledSequence]) -> None:
        logits, features = self._runner.execute(steps, self._proposer.capture_layers)
        started = time.perf_counter()
        verified = [Verification(step, 0) for step in steps]
        self._proposer.learn(Step(Batch([*steps], 0, 0, []), verified, logits, features))
        self._observe_seconds += time.perf_counter() - started
        end = 0
        for step in steps:
            begin, end = end, end + step.num_logits
            request = step.request
            position = request.num_tokens
            [token] = choose_tokens(logits[begin : begin + 1], [request.sampling], [position], team=self._team)
            request.num_computed_tokens = position
            request.all_token_ids.append(token)
            request.output_token_ids.append(token)


def bounded(items: Iterable[_Item], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[_Item]:
    """The items until another one, if it took as long as the longest before it, would end later than ``seconds``."""
    start = before = clock()
    longest = 0.0
    for item in items:
        if before - start + longest > seconds:
            return
        yield item
        now = clock()
        longest, before = max(longest, now - before), now


def measure(
    target: Target, method: str, draft: str | None, batch: int, rounds: int, steps: int, seconds: float
) -> list[Split]:
    """All vocabularies at one batch size, those left out that have more rows than the model."""
    prompts = [target.tokenizer.encode_messages(prompt.messages) for prompt in mixed_prompts(target.files.name, batch)]
    total = WARMUP_STEPS + rounds * steps
    rows = [count for count in ROWS if count < target.loaded.spec.vocab_size]
    benches = {count: Bench(target, *load_draft(target, method, draft, count), prompts, total) for count in rows}
    for bench in benches.values():
        bench.measure(WARMUP_STEPS)
    taken: dict[int, list[tuple[float, float, float]]] = {count: [] for count in rows}
    for _ in bounded(range(rounds), seconds):
        for count, bench in benches.items():
            taken[count].append(bench.measure(steps))
    middle = {count: [median(column) for column in zip(*parts, strict=True)] for count, parts in taken.items()}
    return [Split(count, batch, *middle[count]) for count in rows]


def table_of(model: str, description: str, splits: Sequence[Split]) -> Table:
    table = Table("sequences", "rows of the head", title=f"{model}, {description}: one draft token of each sequence")
    for header in ("head ms", "layer ms", "head's share", "observe ms a step"):
        table.add_column(header, justify="right")
    for s in splits:
        times = [f"{1e3 * value:.3f}" for value in (s.head, s.layer, s.observe)]
        table.add_row(str(s.batch), f"{s.rows:,}" if s.rows else "full", *times[:2], f"{s.head_share:.0%}", times[2])
        if s.rows == ROWS[-1]:
            table.add_section()
    return table


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; default: smollm2-135m.")] = None,
    method: Annotated[str, typer.Option(help="eagle3 or draft_model.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Draft directory or draft model; default: the one shipped.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; default: 1, 8 and 32.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of all vocabularies in turn.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="In a row, of each vocabulary.")] = 8,
    minutes: Annotated[float, typer.Option(help="No round is begun that would end later.")] = 10.0,
    quick: Annotated[bool, typer.Option(help="Under two minutes: fewer rounds and sizes.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "step_share",
) -> None:
    """Times head and layer of a draft step, prints a table and writes a JSON file."""
    if quick:
        rounds, batch, minutes = min(rounds, 3), batch or [1, 8], min(minutes, 1.5)
    models, sizes = model or ["smollm2-135m"], batch or [1, 8, 32]
    seconds = 60 * minutes / len(models) / len(sizes)
    console = Console(width=150)
    record: dict[str, Any] = {"environment": environment(), "chain": CHAIN, "models": {}}
    for each in models:
        target = load_target(each)
        splits = [split for size in sizes for split in measure(target, method, draft, size, rounds, steps, seconds)]
        console.print(table_of(each, f"{method} {draft or 'draft'}", splits))
        record["models"][each] = [asdict(split) | {"head_share": split.head_share} for split in splits]
    write_record(name, record)


if __name__ == "__main__":
    typer.run(main)
