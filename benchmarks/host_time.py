"""What a step costs the host: ``python -m benchmarks.host_time``, by batch size and draft vocabulary.

The engine decodes with its arithmetic replaced (``benchmarks.common.stubbed_engine`` says by what), and drafts the same
number of tokens for every sequence in every step. Printed is the processor time of the thread that steps
(``time.thread_time``), less that of the stubs: what a GPU would wait for, if launching kernels took no time. Launches
and copies inside of the replaced parts are not in it, nor are the attention's plan, the graphs of a GPU's steps, and
the messages between engine and server. All vocabularies are measured the same way and take turns of a few steps.

Where vocabularies are dynamic, every request has one of its own, also beyond the number that the engine gives out by
default. ``--profile`` prints the functions that take the most time themselves, by the wall clock and slowed down by
the profiler, next to what they take with the full head.
"""

from __future__ import annotations

import cProfile
import gc
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from types import CodeType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import stubbed_engine, stubbed_networks
from benchmarks.common.environment import environment
from benchmarks.common.machine import REPOSITORY, write_record
from benchmarks.common.stubbed_engine import Texts, make_engine
from benchmarks.common.stubbed_networks import StubTime
from evospec.engine.config import (
    CacheConfig,
    DynamicConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.messages import EngineRequest, SamplingParams
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer

PROMPT_TOKENS = 128
WARMUP_STEPS, PROFILED_STEPS, ROUND = 20, 40, 10
PROFILE_LINES = 25
_CLIENT = b"benchmark"


@dataclass(frozen=True)
class Result:
    """Seconds a step, and what the steps did."""

    batch: int
    vocabulary: str
    median: float
    mean: float
    first_accepted: float | None
    """Share of the first drafts; None without drafts."""
    tokens_each: float
    """Of a sequence in a step."""


@dataclass(frozen=True)
class Profile:
    """Calls and own seconds in a step, by function. Of stubs, and of what they call, there is nothing."""

    calls: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def dearest(self) -> list[str]:
        return sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)[:PROFILE_LINES]

    def record(self) -> list[dict[str, Any]]:
        return [{"function": f, "calls": self.calls[f], "own_seconds": self.seconds[f]} for f in self.dearest]


class Run:
    """An engine that decodes all ``texts`` at once."""

    def __init__(self, texts: Texts, model: str, vocabulary: str, k: int) -> None:
        prompts = texts.prompts(PROMPT_TOKENS)
        self.vocabulary, self._batch = vocabulary, len(prompts)
        self._core = make_engine(_config(model, vocabulary, len(prompts), k, texts.length), texts)
        sampling = SamplingParams(max_tokens=texts.length, seed=0, temperature=0.0, ignore_eos=True)
        for number, tokens in enumerate(prompts):
            one = EngineRequest(request_id=str(number), prompt_token_ids=tokens, sampling=sampling, tenant="benchmark")
            self._core.add(_CLIENT, one)
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._seconds: list[float] = []
        self._num_tokens, self._first_right = 0, list[bool]()

    def warm_up(self) -> None:
        """Read the prompts, and take the first steps."""
        self.steps(WARMUP_STEPS)
        self._forget_steps()

    def steps(self, number: int, profile: cProfile.Profile | None = None) -> None:
        for _ in range(number):
            stubbed, started = StubTime.seconds, time.thread_time()
            if profile is not None:
                profile.enable()
            outputs, _ = self._core.step()
            if profile is not None:
                profile.disable()
            self._seconds.append(time.thread_time() - started - (StubTime.seconds - stubbed))
            for output in outputs[_CLIENT]:
                if output.num_draft_tokens:
                    self._first_right.append(output.num_accepted_tokens > 0)
                self._num_tokens += len(output.token_ids)

    def result(self) -> Result:
        """Of all steps since the warm-up."""
        first = fmean(self._first_right) if self._first_right else None
        tokens_each = self._num_tokens / len(self._seconds) / self._batch
        return Result(self._batch, self.vocabulary, median(self._seconds), fmean(self._seconds), first, tokens_each)

    def profile(self) -> Profile:
        profile = cProfile.Profile()
        self.steps(PROFILED_STEPS, profile)
        calls, seconds = Counter[str](), Counter[str]()
        for entry in profile.getstats():
            # What a stub calls is in the function's own entry, too, and is taken out of it again.
            parts: Iterable[Any] = (entry.calls or ()) if _is_stub(entry.code) else (entry,)
            sign = -1 if _is_stub(entry.code) else 1
            for part in parts:
                if not _is_stub(part.code):
                    calls[_name(part.code)] += sign * part.callcount
                    seconds[_name(part.code)] += sign * part.inlinetime
        return Profile(_in_a_step(calls), _in_a_step(seconds))


def _config(model: str, vocabulary: str, batch: int, k: int, length: int) -> EngineConfig:
    speculation = SpeculationConfig(method="none")
    if vocabulary != "none":
        speculation = SpeculationConfig(
            method="eagle3",
            vocabulary=vocabulary,
            dynamic=DynamicConfig(max_sessions=batch),
            num_speculative_tokens=k,
            adaptive=False,
        )
    return EngineConfig(
        model=ModelConfig(name=model),
        cache=CacheConfig(num_blocks=batch * (length // CacheConfig().block_size + 2)),
        scheduler=SchedulerConfig(max_num_seqs=batch, max_batched_tokens=max(512, batch * PROMPT_TOKENS)),
        speculation=speculation,
    )


def _is_stub(code: CodeType | str) -> bool:
    return isinstance(code, CodeType) and code.co_filename in (stubbed_engine.__file__, stubbed_networks.__file__)


def _name(code: CodeType | str) -> str:
    """A function's file, line and name, or what a built-in one is called."""
    if isinstance(code, str):
        return code.strip("<>").removeprefix("built-in method ")
    path = Path(code.co_filename)
    shown = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path.name
    return f"{shown}:{code.co_firstlineno} {code.co_qualname}"


def _in_a_step(totals: Mapping[str, float]) -> dict[str, float]:
    return {name: total / PROFILED_STEPS for name, total in totals.items()}


def measure(
    model: str, vocabularies: Sequence[str], batch: int, k: int, steps: int, profiled: bool
) -> tuple[list[Result], dict[str, Profile]]:
    """All vocabularies at one batch size, and their profiles by vocabulary, if they are wanted."""
    num_steps = WARMUP_STEPS + steps + ROUND + PROFILED_STEPS
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    texts = Texts(tokenizer, batch, PROMPT_TOKENS + (k + 1) * (num_steps + 1))
    with texts.said():
        runs = [Run(texts, model, vocabulary, k) for vocabulary in vocabularies]
        gc.collect()
        gc.freeze()  # as the engine's process does before its first step
        for run in runs:
            run.warm_up()
        for run in runs * -(-steps // ROUND):
            run.steps(ROUND)
        results = [run.result() for run in runs]
        profiles = {run.vocabulary: run.profile() for run in runs} if profiled else {}
    gc.unfreeze()
    return results, profiles


def table_of(results: Sequence[Result], title: str) -> Table:
    table = Table("batch", "vocabulary", title=title)
    for header in ("ms a step, median", "mean", "more than full head", "first drafts accepted", "tokens each"):
        table.add_column(header, justify="right")
    full = {one.batch: one.median for one in results if one.vocabulary == "full"}
    for before, one in zip([None, *results], results, strict=False):
        if before is not None and before.batch != one.batch:
            table.add_section()
        more = f"{1e3 * (one.median - full[one.batch]):+.2f}" if one.batch in full else ""
        accepted = "" if one.first_accepted is None else f"{one.first_accepted:.0%}"
        times = [f"{1e3 * seconds:.2f}" for seconds in (one.median, one.mean)]
        table.add_row(str(one.batch), one.vocabulary, *times, more, accepted, f"{one.tokens_each:.2f}")
    return table


def profile_table(profile: Profile, full: Profile | None, title: str) -> Table:
    """The dearest functions; ``full``: the same with the full head."""
    table = Table("function", title=title)
    for header in ("calls a step", "own ms a step", "share", "with the full head"):
        table.add_column(header, justify="right")
    total = sum(profile.seconds.values())
    for name in profile.dearest:
        seconds = profile.seconds[name]
        in_full = "" if full is None else f"{1e3 * full.seconds.get(name, 0.0):.3f}"
        table.add_row(name, f"{profile.calls[name]:.1f}", f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}", in_full)
    return table


def main(
    model: Annotated[
        str, typer.Option(help="Registry name of a model with a draft; its tokens count.")
    ] = "smollm2-135m",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences, repeatable; default: 1, 64 and 256.")] = None,
    vocab: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; default: none (no draft), full, static:8192 and dynamic:512+512."),
    ] = None,
    k: Annotated[int, typer.Option(min=1, max=8, help="Drafts of each sequence in a step.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each vocabulary and batch size.")] = 100,
    profile: Annotated[bool, typer.Option(help="Print the functions that take the most time, too.")] = False,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "host_time",
) -> None:
    """Measures the host's time, prints a table and writes a JSON file."""
    vocabularies = vocab or ["none", "full", "static:8192", "dynamic:512+512"]
    torch.set_num_threads(1)
    console = Console(width=150)
    record: dict[str, Any] = {"environment": environment(), "model": model, "k": k, "steps": steps}
    results: list[Result] = []
    profiles: dict[str, Any] = {}
    for size in batch or [1, 64, 256]:
        of_size, profiles_of_size = measure(model, vocabularies, size, k, steps, profile)
        results += of_size
        for vocabulary, one in profiles_of_size.items():
            title = f"{vocabulary}, batch {size}"
            console.print(profile_table(one, profiles_of_size.get("full"), title))
            profiles[title] = one.record()
    console.print(table_of(results, f"{model}, {k} drafts a step: the host's time"))
    record |= {"results": [asdict(one) for one in results], "profiles": profiles}
    write_record(name, record)


if __name__ == "__main__":
    typer.run(main)
