"""Load for any OpenAI-compatible server, and what it makes of it: speed, latencies, errors."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evospec.server.bench.stream import StreamResult, stream

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class LoadOptions:
    """What is sent. ``url`` has no ``/v1``. ``max_seconds`` bounds the measured part: no request starts after it."""

    url: str
    model: str
    concurrency: int
    num_requests: int
    max_tokens: int
    warmup_requests: int = 0
    warmup_tokens: int = 16
    temperature: float = 0.0
    ignore_eos: bool = True
    chat: bool = True
    max_seconds: float = 600.0
    api_key: str | None = None


@dataclass(frozen=True)
class Percentiles:
    """Seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class LoadReport:
    """What was measured. ``output_tokens`` comes from the server's ``usage``, not from counting events.

    ``itl`` is the time between two events of a stream; ``tpot`` a request's time after its first token over
    the tokens after it, so it does not depend on how many tokens the server puts in one event.
    ``tokens_per_step``: of the steps that checked drafts; None where the server tells nothing of drafts.
    ``client_cpu_per_token`` is in seconds of this process.
    """

    requests: int
    errors: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_second: float
    tokens_per_event: float
    tokens_per_step: float | None
    ttft: Percentiles
    itl: Percentiles
    tpot: Percentiles
    client_cpu_per_token: float
    error_messages: list[str]


def percentiles(values: Sequence[float]) -> Percentiles:
    """Nearest-rank percentiles; NaN where there is no value."""
    ordered = sorted(values)
    if not ordered:
        return Percentiles(math.nan, math.nan, math.nan)
    p50, p90, p99 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99))
    return Percentiles(p50, p90, p99)


def summarise(results: Sequence[StreamResult], seconds: float, cpu_seconds: float) -> LoadReport:
    """Failed requests count as errors and in nothing else."""
    good = [result for result in results if result.error is None]
    tokens = sum(result.completion_tokens for result in good)
    gaps = [b - a for r in good for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
    tpot = [
        (r.token_times[-1] - r.token_times[0]) / (r.completion_tokens - 1)
        for r in good
        if r.completion_tokens > 1 and r.token_times
    ]
    drafts = [result.speculation for result in good if result.speculation is not None]
    steps = sum(one.num_spec_steps for one in drafts)
    return LoadReport(
        requests=len(results),
        errors=len(results) - len(good),
        seconds=seconds,
        prompt_tokens=sum(result.prompt_tokens for result in good),
        output_tokens=tokens,
        tokens_per_second=tokens / seconds,
        tokens_per_event=tokens / max(1, sum(len(result.token_times) for result in good)),
        tokens_per_step=1 + sum(one.num_accepted_draft_tokens for one in drafts) / steps if steps else None,
        ttft=percentiles([r.token_times[0] - r.start for r in good if r.token_times]),
        itl=percentiles(gaps),
        tpot=percentiles(tpot),
        client_cpu_per_token=cpu_seconds / max(1, tokens),
        error_messages=sorted({result.error for result in results if result.error is not None})[:5],
    )


def request_body(options: LoadOptions, messages: Messages) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    if options.chat:
        return f"{options.url}/v1/chat/completions", body | {"messages": messages}
    return f"{options.url}/v1/completions", body | {"prompt": "\n\n".join(m["content"] for m in messages)}


async def run_load(
    options: LoadOptions, prompts: Sequence[Messages], progress: Progress | None = None
) -> tuple[LoadReport, list[StreamResult]]:
    """Keeps ``concurrency`` requests in flight until ``num_requests`` are done or ``max_seconds`` have passed.

    Warm-up requests go first and use the last prompts, so that they leave no prefix of a measured one in a
    server's cache (where there are enough prompts).
    """
    warmup = list(reversed(prompts))[: options.warmup_requests]
    await _drive(replace(options, max_tokens=options.warmup_tokens), warmup, options.warmup_requests, None)
    cpu, start = time.process_time(), time.perf_counter()
    results = await _drive(options, prompts, options.num_requests, progress)
    seconds = max(result.end for result in results) - start
    return summarise(results, seconds, time.process_time() - cpu), results


async def _drive(
    options: LoadOptions, prompts: Sequence[Messages], count: int, progress: Progress | None
) -> list[StreamResult]:
    results: list[StreamResult] = []
    numbers = iter(range(count))
    deadline = time.perf_counter() + options.max_seconds
    task = progress.add_task(f"concurrency {options.concurrency}", total=count) if progress else None

    async def worker() -> None:
        for number in numbers:
            if time.perf_counter() > deadline:
                return
            url, body = request_body(options, prompts[number % len(prompts)])
            results.append(await stream(url, body, api_key=options.api_key))
            if progress is not None and task is not None:
                progress.advance(task)

    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    return results


def new_progress(console: Console) -> Progress:
    """A progress bar drawn seldom: drawing takes CPU from the server measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, refresh_per_second=2)
