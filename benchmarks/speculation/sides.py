"""What ``benchmarks.speculation`` compares: one engine for each mode, in this process or behind its HTTP server."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.common.acceptance import Acceptance
from benchmarks.common.in_process import (
    KV_BYTES,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    PARTS,
    Engine,
    Generation,
    Turn,
    answer_lengths,
    encode_chat,
    load_target,
    take_turns,
)
from benchmarks.common.load import LoadOptions, run_load
from benchmarks.common.process import LOGS, Launch, NoiseMeter, free_port, running
from benchmarks.prompts.build import Prompt
from engine.config import EngineConfig
from engine.messages import SamplingParams


@dataclass(frozen=True)
class Measured:
    """One run of one side.

    ``tokens_per_second`` is of the whole run, prompts included; ``decode_tokens_per_second`` of the steps without a
    prompt (None where that is not known). ``noise`` is the share of the machine used by other processes in percent.
    """

    tokens: int
    seconds: float
    decode_tokens_per_second: float | None
    acceptance: Acceptance
    step_seconds: dict[str, float]
    noise: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Sides(Protocol):
    """All modes, ready."""

    def measure(
        self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int, ignore_eos: bool
    ) -> Mapping[str, Measured]:
        """Every mode's greedy answers to the same prompts.

        Args:
            prompts: to answer.
            concurrency: answers at a time.
            max_tokens: of an answer.
            ignore_eos: whether answers go on where the model would end them.
        """
        ...


class InProcessSides:
    """Steps an engine for each mode, all with the same target; with ``ignore_eos`` answers have ``answer_lengths``."""

    def __init__(self, configs: Mapping[str, EngineConfig]) -> None:
        target = load_target(next(iter(configs.values())))
        self._engines = {mode: Engine(config, target) for mode, config in configs.items()}

    def measure(
        self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int, ignore_eos: bool
    ) -> Mapping[str, Measured]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=ignore_eos)
        lengths = answer_lengths(len(prompts), max_tokens) if ignore_eos else [max_tokens] * len(prompts)
        tokenizer = next(iter(self._engines.values())).tokenizer
        turns = [
            Turn(encode_chat(tokenizer, prompt), max_tokens=length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        noise = NoiseMeter()
        runs = take_turns([engine.answering(turns, sampling, concurrency) for engine in self._engines.values()])
        others = noise.read()
        if ignore_eos and any(run.num_tokens != sum(lengths) for run in runs):
            raise RuntimeError(f"not all answers have {sum(lengths)} tokens: {[run.num_tokens for run in runs]}")
        return {mode: _measured(run, others) for mode, run in zip(self._engines, runs, strict=True)}


def _measured(run: Generation, noise: float) -> Measured:
    decode = run.decode_tokens / run.decode_seconds if run.decode_tokens else None
    return Measured(run.num_tokens, run.seconds, decode, run.acceptance(), run.step_seconds, noise)


class HttpSides:
    """Loads a server for each mode, one after another, every other time in the opposite order."""

    def __init__(self, servers: Mapping[str, HttpSide]) -> None:
        self._servers, self._calls = servers, count()

    def measure(
        self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int, ignore_eos: bool
    ) -> Mapping[str, Measured]:
        modes = list(self._servers)[:: 1 if next(self._calls) % 2 == 0 else -1]
        return {mode: self._servers[mode].measure(prompts, concurrency, max_tokens, ignore_eos) for mode in modes}


class HttpSide:
    """Loads a server and reads what drafting did from its metrics."""

    def __init__(self, model: str, url: str, server: psutil.Process) -> None:
        self._model, self._url, self._server = model, url, server

    def measure(self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int, ignore_eos: bool) -> Measured:
        options = LoadOptions(self._url, self._model, concurrency, len(prompts), max_tokens, ignore_eos=ignore_eos)
        before, noise = self._scrape(), NoiseMeter(self._server)
        report, _ = uvloop.run(run_load(options, [prompt.messages for prompt in prompts]))
        if report.errors:
            raise RuntimeError(f"{self._url}: {report.error_messages}")
        if ignore_eos and report.output_tokens != len(prompts) * max_tokens:
            raise RuntimeError(f"{self._url} generated {report.output_tokens} tokens, not {len(prompts) * max_tokens}")
        noise_percent, after = noise.read(), self._scrape()
        new = {sample: value - before.get(sample, 0.0) for sample, value in after.items()}
        return Measured(
            tokens=report.output_tokens,
            seconds=report.seconds,
            decode_tokens_per_second=None,
            acceptance=acceptance_of(new),
            step_seconds={part: new.get(("evospec:engine_step_seconds_sum", part), 0.0) for part in PARTS},
            noise=noise_percent,
        )

    def _scrape(self) -> dict[tuple[str, str], float]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=30) as answer:
            return samples(answer.read().decode())


def samples(exposition: str) -> dict[tuple[str, str], float]:
    """Values by metric and its ``part`` or ``position`` (empty without), summed over all other labels."""
    result: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            key = sample.name, sample.labels.get("part") or sample.labels.get("position") or ""
            result[key] = result.get(key, 0.0) + sample.value
    return result


def acceptance_of(counters: dict[tuple[str, str], float]) -> Acceptance:
    """From the growth of the counters by position."""
    drafted = _by_position(counters, "evospec:spec_decode_num_draft_tokens_per_pos_total")
    accepted = _by_position(counters, "evospec:spec_decode_num_accepted_tokens_per_pos_total")
    reached = sum(count > 0 for count in drafted)
    return Acceptance(drafted[:reached], accepted[:reached])


def _by_position(counters: dict[tuple[str, str], float], name: str) -> list[int]:
    found = {int(position): round(value) for (metric, position), value in counters.items() if metric == name}
    return [found[position] for position in sorted(found)]


def launch(config: EngineConfig, port: int) -> Launch:
    """How a server with this engine is started."""
    speculation = config.speculation
    options = {
        "model": config.model.name,
        "port": port,
        "log.level": "warning",
        "engine.model.max_model_len": MAX_MODEL_LEN,
        "engine.cache.prefix_caching": False,
        "engine.cache.max_bytes": KV_BYTES,
        "engine.scheduler.max_num_seqs": MAX_SEQUENCES,
        "engine.speculation.method": speculation.method,
        "engine.speculation.draft": speculation.draft,
        "engine.speculation.vocabulary": speculation.vocabulary,
        "engine.speculation.num_speculative_tokens": speculation.num_speculative_tokens,
        "engine.speculation.adaptive": speculation.adaptive,
        "engine.speculation.copies": speculation.copies,
    }
    arguments: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments += [f"--{name}", str(value)]
    return Launch([str(Path(sys.executable).with_name("evospec")), "serve", *arguments])


@contextmanager
def http_side(config: EngineConfig, mode: str) -> Iterator[HttpSide]:
    """Runs a server until the block ends."""
    port, model = free_port(), config.model.name
    with running(launch(config, port), port, LOGS / f"speculation-{model}-{mode.replace('/', '-')}.log") as server:
        yield HttpSide(model, f"http://127.0.0.1:{port}", server)
