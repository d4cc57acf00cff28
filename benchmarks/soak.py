"""Trials of an EvoSpec server under load that is meant to hurt it; each prints a table, any failure exits with 1.

``python -m benchmarks.soak`` runs all three, each on a server it starts itself on a loopback port:
- *streams*: 200 streams at once, none may fail, and all must run at the same time;
- *disconnects*: 500 clients that go away at random; all KV blocks must come back;
- *mixed*: an hour's worth of requests (3,600, one a second) of all kinds as fast as they go, bounded in time;
  after a warm-up no process may grow beyond a stated bound.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import httpx
import psutil
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.common.process import Launch, memory, metrics, running
from benchmarks.prompts.build import read_eval
from benchmarks.serve.peers import EvoSpec
from server.bench.load import LoadOptions, new_progress, request_body, run_load
from server.bench.stream import StreamResult, stream

SEED = 7
SETTLE_SECONDS = 20.0
SAMPLE_SECONDS = 2.0
MIXED_CONCURRENCY = 16
# Small, so that every block has been touched (and counts as resident) long before the first memory sample.
MIXED_KV_BYTES = 256 * 2**20


@dataclass
class Trial:
    """Outcome of one trial: rows of (what, value, bound) and whether all bounds held."""

    name: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    passed: bool = True

    def add(self, what: str, value: object, bound: str = "", holds: bool = True) -> None:
        self.rows.append((what, str(value), bound if holds else f"{bound}  FAILED"))
        self.passed = self.passed and holds

    def table(self) -> Table:
        table = Table("what", "measured", "bound", title=f"{self.name}: {'passed' if self.passed else 'FAILED'}")
        for row in self.rows:
            table.add_row(*row)
        return table


def server(model: str, name: str, *options: str) -> AbstractContextManager[tuple[str, psutil.Process]]:
    """An EvoSpec server of its own: its URL and main process."""

    def launch(port: int) -> Launch:
        return Launch([*EvoSpec().launch(model, 1, port).command, *options])

    return running(launch, f"soak-{name}")


def metric(url: str, name: str) -> float:
    """The value of one metric without labels. Raises KeyError when the server does not have it."""
    return {sample.name: sample.value for sample in metrics(url) if not sample.labels}[name]


class MixedLoad:
    """Requests of all kinds, chosen at random with a fixed seed; counts how each kind ended."""

    def __init__(self, url: str, model: str) -> None:
        self._options = LoadOptions(url=url, model=model, concurrency=1, num_requests=1, max_tokens=1)
        self._chance = random.Random(SEED)
        self._prompts = read_eval()
        self._http = httpx.AsyncClient(base_url=url, timeout=120)
        self._kinds = {
            self.chat: 45,
            self.completion: 20,
            self.drop: 15,
            self.several: 10,
            self.invalid: 5,
            self.tokenise: 5,
        }
        self.done: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    async def one(self) -> None:
        (kind,) = self._chance.choices(list(self._kinds), list(self._kinds.values()))
        problem = await kind()
        self.done[kind.__name__] += 1
        if problem:
            self.failures[f"{kind.__name__}: {problem}"] += 1

    def _request(self, chat: bool = True) -> tuple[str, dict[str, Any]]:
        options = replace(
            self._options,
            max_tokens=self._chance.randint(1, 96),
            temperature=self._chance.choice([0.0, 0.7, 1.0]),
            ignore_eos=self._chance.random() < 0.3,
            chat=chat,
        )
        return request_body(options, self._chance.choice(self._prompts).messages)

    async def chat(self) -> str | None:
        return (await stream(*self._request())).error

    async def completion(self) -> str | None:
        return (await stream(*self._request(chat=False))).error

    async def drop(self) -> str | None:
        result = await stream(*self._request(), drop_after=self._chance.uniform(0.01, 1.0))
        return None if result.error == "dropped by the client" else result.error

    async def several(self) -> str | None:
        """Two choices, log-probabilities, a stop string, not streamed."""
        url, body = self._request()
        del body["stream"], body["stream_options"]
        answer = await self._http.post(url, json=body | {"n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["\n\n"]})
        return None if answer.status_code == 200 and len(answer.json()["choices"]) == 2 else answer.text[:200]

    async def invalid(self) -> str | None:
        url, body = self._request()
        wrong: dict[str, Any] = self._chance.choice(
            [{"temperature": -1}, {"max_tokens": "many"}, {"messages": []}, {"top_p": 7}]
        )
        answer = await self._http.post(url, json=body | wrong)
        return None if answer.status_code == 400 else f"HTTP {answer.status_code} for {wrong}"

    async def tokenise(self) -> str | None:
        prompt = self._chance.choice(self._prompts).messages[0]["content"]
        answer = await self._http.post("/tokenize", json={"model": self._options.model, "prompt": prompt})
        return None if answer.status_code == 200 else answer.text[:200]


def peak_overlap(results: Sequence[StreamResult]) -> int:
    """Most streams that were between their first and last token at the same time."""
    changes = [
        change
        for result in results
        if result.token_times
        for change in ((result.token_times[0], 1), (result.token_times[-1], -1))
    ]
    peak = now = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


def streams(model: str, count: int) -> Trial:
    trial = Trial(f"{count} concurrent streams")
    with server(model, "streams") as (url, _):
        options = LoadOptions(
            url=url, model=model, concurrency=count, num_requests=count, max_tokens=128, max_seconds=60
        )
        report, results = uvloop.run(run_load(options, [prompt.messages for prompt in read_eval()]))
        alive = metric(url, "evospec:engine_up")
    trial.add("streams started", report.requests, str(count), report.requests == count)
    trial.add("failed", f"{report.errors} {report.error_messages or ''}", "0", report.errors == 0)
    trial.add("most at the same time", peak_overlap(results), str(count), peak_overlap(results) >= count)
    trial.add("engine up afterwards", f"{alive:.0f}", "1", alive == 1)
    trial.add("output tok/s", f"{report.tokens_per_second:.0f}")
    trial.add("TTFT p50 / p99, s", f"{report.ttft.p50:.1f} / {report.ttft.p99:.1f}")
    trial.add("ITL p50 / p99, ms", f"{1e3 * report.itl.p50:.0f} / {1e3 * report.itl.p99:.0f}")
    return trial


async def _drop_clients(options: LoadOptions, count: int) -> list[StreamResult]:
    """``count`` clients, ``options.concurrency`` at a time, each gone after a random time."""
    chance = random.Random(SEED)
    prompts = read_eval()
    patience = [chance.uniform(0.02, 10.0) for _ in range(count)]
    numbers = iter(range(count))
    results: list[StreamResult] = []

    async def worker() -> None:
        for number in numbers:
            url, body = request_body(options, prompts[number % len(prompts)].messages)
            results.append(await stream(url, body, drop_after=patience[number]))

    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    return results


def disconnects(model: str, count: int) -> Trial:
    """``count`` clients that go away; the pool must be as it was."""
    trial = Trial(f"{count} clients that disconnect at random")
    with server(model, "disconnects") as (url, _):
        baseline = metric(url, "evospec:kv_blocks_used")
        options = LoadOptions(url=url, model=model, concurrency=64, num_requests=count, max_tokens=512)
        results = uvloop.run(_drop_clients(options, count))
        peak = metric(url, "evospec:kv_blocks_used")
        start = time.monotonic()
        used = peak
        while used != baseline and time.monotonic() - start < SETTLE_SECONDS:
            time.sleep(0.1)
            used = metric(url, "evospec:kv_blocks_used")
        settled = time.monotonic() - start
        working = metric(url, "evospec:num_requests_running") + metric(url, "evospec:num_requests_waiting")
    endings = Counter("finished" if r.error is None else r.error for r in results)
    dropped = endings.pop("dropped by the client", 0)
    silent = sum(r.error is not None and not r.token_times for r in results)
    failures = {ending: number for ending, number in endings.items() if ending != "finished"}
    trial.add(
        "clients that went away",
        f"{dropped} ({silent} before the first token)",
        f"≥ {count // 2}",
        dropped * 2 >= count,
    )
    trial.add("clients that stayed to the end", endings["finished"])
    trial.add("failures of the server", failures or 0, "0", not failures)
    trial.add("KV blocks used before", f"{baseline:.0f}")
    trial.add("KV blocks used when the last client left", f"{peak:.0f}")
    trial.add("KV blocks used after", f"{used:.0f} ({settled:.1f} s later)", f"{baseline:.0f}", used == baseline)
    trial.add("sequences left in the engine", f"{working:.0f}", "0", working == 0)
    return trial


async def _mixed(load: MixedLoad, process: psutil.Process, requests: int, seconds: float) -> list[dict[str, int]]:
    """Sends the requests; returns samples of resident bytes by role, one each ``SAMPLE_SECONDS``."""
    deadline = time.monotonic() + seconds
    numbers = iter(range(requests))
    samples: list[dict[str, int]] = []

    async def worker() -> None:
        for _ in numbers:
            if time.monotonic() > deadline:
                return
            await load.one()
            progress.advance(task)

    async def sampler() -> None:
        while True:
            samples.append(memory(process, "rss"))
            await asyncio.sleep(SAMPLE_SECONDS)

    with new_progress(Console()) as progress:
        task = progress.add_task("mixed", total=requests)
        watch = asyncio.create_task(sampler())
        await asyncio.gather(*(worker() for _ in range(MIXED_CONCURRENCY)))
        watch.cancel()
    return samples


def mixed(model: str, requests: int, seconds: float, bound_mib: float) -> Trial:
    """Mixed load; the greatest RSS of the last quarter against that of the second."""
    trial = Trial(f"mixed load, {requests} requests in at most {seconds:.0f} s, {MIXED_CONCURRENCY} at a time")
    with server(model, "mixed", "--kv-max-bytes", str(MIXED_KV_BYTES)) as (url, process):
        load = MixedLoad(url, model)
        start = time.monotonic()
        samples = uvloop.run(_mixed(load, process, requests, seconds))
        elapsed = time.monotonic() - start
        restarts = metric(url, "evospec:engine_restarts_total")
    total = sum(load.done.values())
    trial.add(
        "requests", f"{total} in {elapsed:.0f} s: {dict(load.done)}", f"≥ {requests // 4}", total >= requests // 4
    )
    trial.add("failures", dict(load.failures) or 0, "0", not load.failures)
    trial.add("engine restarts", f"{restarts:.0f}", "0", restarts == 0)
    quarter = len(samples) // 4
    for name in samples[-1]:
        early = max(sample[name] for sample in samples[quarter : 2 * quarter]) / 2**20
        late = max(sample[name] for sample in samples[-quarter:]) / 2**20
        values = f"{early:.1f} MiB in the second quarter, {late:.1f} in the last"
        trial.add(f"memory of {name}", values, f"growth ≤ {bound_mib:.0f} MiB", late - early <= bound_mib)
    return trial


def main(
    trial: Annotated[list[str] | None, typer.Argument(help="streams, disconnects, mixed; default: all.")] = None,
    model: Annotated[str, typer.Option(help="Model to serve.")] = "smollm2-135m",
    requests: Annotated[int, typer.Option(min=100, help="Requests of the mixed trial.")] = 3600,
    seconds: Annotated[float, typer.Option(min=20, help="Longest time of the mixed trial.")] = 900.0,
    growth: Annotated[float, typer.Option(help="MiB that a process may grow in the mixed trial.")] = 32.0,
) -> None:
    """Runs the trials one after the other."""
    trials = {
        "streams": lambda: streams(model, 200),
        "disconnects": lambda: disconnects(model, 500),
        "mixed": lambda: mixed(model, requests, seconds, growth),
    }
    console = Console(width=150)
    passed = True
    for name in trial or trials:
        outcome = trials[name]()
        console.print(outcome.table())
        passed = passed and outcome.passed
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
