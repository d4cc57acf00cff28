"""Real replicas behind Envoy that are told the same conversations as the model, and one that is measured alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import fmean
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from benchmarks.common.process import LOGS, NoiseMeter, cpu_seconds, tree
from benchmarks.fleet.envoy import EnvoyRouter
from benchmarks.fleet.processes import (
    METRICS_KEY,
    MODEL,
    REPLICA_OPTIONS,
    TENANTS,
    Process,
    new_replica,
    running_valkey,
)
from benchmarks.fleet.simulation.fleet import Served
from benchmarks.fleet.simulation.traces import Conversation, Scale
from benchmarks.prompts.build import read_eval
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.bench.stream import StreamResult, stream
from evospec.server.session_ids import find_session_id, session_key

_OPTIONS = [one for one in REPLICA_OPTIONS if one != "--no-engine.speculation.adaptive"]
_OPTIONS += ["--log.format", "json"]


class RealFleet:
    """Replicas that run, each of one thread, with Valkey and Envoy. ``url`` is Envoy's."""

    def __init__(self, replicas: Sequence[Process], url: str, redis: Redis, others: Sequence[psutil.Process]) -> None:
        self.replicas, self.url, self.redis = replicas, url, redis
        self._roots = [psutil.Process(replica.pid) for replica in replicas]
        self._engines = [next(one for one in tree(root) if _is_engine(one)) for root in self._roots]
        self._others = others
        tokenizer = Tokenizer.from_files(resolve_model(ModelConfig(name=MODEL)))
        self._tokenizer = tokenizer
        self._corpus = tokenizer.encode(" ".join(one.passage for one in read_eval()), add_special_tokens=False)

    @property
    def addresses(self) -> list[str]:
        """As Envoy hashes them."""
        return [(replica.url or "").removeprefix("http://") for replica in self.replicas]

    def logged(self) -> list[list[dict[str, Any]]]:
        paths = [LOGS / f"fleet-{replica.name}.log" for replica in self.replicas]
        return [[json.loads(line) for line in path.read_text().splitlines() if line[:1] == "{"] for path in paths]

    def step_costs(self) -> dict[str, Any]:
        """What the replicas measured at their starts, on average."""
        [*found] = (next(line for line in lines if line["event"].startswith("step costs")) for lines in self.logged())
        tables = ("verify", "first_draft", "next_draft")
        costs: dict[str, Any] = {
            name: {size: fmean(one[name][size] for one in found) for size in found[0][name]} for name in tables
        }
        return costs | {"read": fmean(one["read"] for one in found)}

    def meter(self) -> NoiseMeter:
        """Of what others use of the machine from now on."""
        return NoiseMeter(*self._roots, *self._others)

    def cpu(self) -> NDArray[np.float64]:
        """Seconds of a core so far: in the engines, and outside of them, the clients included."""
        engine = sum(map(cpu_seconds, self._engines))
        return np.array([engine, time.process_time() + sum(map(cpu_seconds, [*self._roots, *self._others])) - engine])

    async def counters(self) -> dict[str, float]:
        """What all replicas count, and Valkey: its commands and bytes, and seconds of its core in scripts."""
        found = defaultdict[str, float](float)
        async with httpx.AsyncClient(trust_env=False) as client:
            for replica in self.replicas:
                headers = {"Authorization": f"Bearer {METRICS_KEY}"}
                text = (await client.get(f"{replica.url}/metrics", headers=headers)).text
                for sample in (one for family in text_string_to_metric_families(text) for one in family.samples):
                    if sample.labels.get("part", "total") == "total":
                        found[sample.name] += sample.value
        info = await self.redis.info("everything")
        commands = {name: one for name, one in info.items() if name.startswith("cmdstat_") and name != "cmdstat_info"}
        found["redis_calls"] = sum(one["calls"] for one in commands.values())
        found["redis_seconds"] = commands.get("cmdstat_evalsha", {}).get("usec", 0) / 1e6
        found["redis_in"], found["redis_out"] = info["total_net_input_bytes"], info["total_net_output_bytes"]
        return found

    async def snapshots(self, conversations: Sequence[Conversation]) -> dict[str, int]:
        """Bytes of each session's snapshot in Redis."""
        sizes = {}
        for number, one in enumerate(conversations):
            tenant = TENANTS[number % len(TENANTS)]
            session_id = find_session_id(tenant, one.name)
            assert session_id is not None
            size = await self.redis.hstrlen(session_key(tenant, MODEL, session_id), "snapshot")
            if size:
                sizes[one.name] = int(size)
        return sizes

    def text(self, place: int, length: int) -> list[int]:
        corpus = self._corpus
        return [corpus[(place + number) % len(corpus)] for number in range(length)]

    async def ask(
        self, prompt: Sequence[int], max_tokens: int, tenant: str, headers: dict[str, str], **more: int
    ) -> tuple[StreamResult, list[int]]:
        """An answer of exactly so many tokens, and its tokens, as its text is read again."""
        body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "min_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **more}
        result = await stream(f"{self.url}/v1/completions", body, api_key=tenant, headers=headers)
        if result.error is not None:
            raise RuntimeError(result.error)
        tokens = self._tokenizer.encode(result.text, add_special_tokens=False)[:max_tokens]
        return result, tokens + self.text(0, max_tokens - len(tokens))

    async def replay(self, conversations: Sequence[Conversation], scale: Scale) -> list[Served]:
        """All turns; as in the model, a pause is counted from the end of an answer."""
        began, served = time.perf_counter(), list[Served]()

        async def talk(number: int, one: Conversation) -> None:
            await asyncio.sleep(max(0.0, one.start + began - time.perf_counter()))
            tokens, place = self.text(0, scale.shared), 7919 * (number + 1)
            for turn, said in enumerate(one.turns):
                await asyncio.sleep(said.pause if turn else 0.0)
                tokens, place = tokens + self.text(place, said.new), place + said.new
                headers = {"x-session-id": one.name, "x-request-id": f"{one.name}-{turn}"}
                result, answer = await self.ask(tokens, said.output, TENANTS[number % len(TENANTS)], headers)
                found = Served(one.name, turn, result.start - began, len(tokens), said.output)
                found.first_token, found.end = result.token_times[0] - began, result.end - began
                found.events = len(result.token_times)
                served.append(found)
                tokens = tokens + answer

        await asyncio.gather(*(talk(number, one) for number, one in enumerate(conversations)))
        self._locate(served)
        while any(one.replica < 0 for one in served):  # a line is written after the answer's end
            await asyncio.sleep(0.1)
            self._locate(served)
        return served

    def _locate(self, served: list[Served]) -> None:
        """What only the replicas' logs tell."""
        of_turn = {f"{one.session}-{one.turn}": one for one in served}
        for number, lines in enumerate(self.logged()):
            for line in lines:
                one = of_turn.get(line.get("request_id", ""))
                if one is not None and line["event"] == "request":
                    one.replica, one.cached_tokens = number, line["cached_tokens"]
        last: dict[str, int] = {}
        for one in sorted(served, key=lambda one: one.turn):
            one.stayed = last.get(one.session) == one.replica
            last[one.session] = one.replica


@asynccontextmanager
async def running_fleet(num_replicas: int) -> AsyncIterator[RealFleet]:
    """One with empty caches; its replicas start one after the other, so that each measures its steps alone."""
    async with AsyncExitStack() as stack:
        valkey, redis_url, directory = await stack.enter_async_context(running_valkey())
        replicas = [new_replica(number, redis_url, _OPTIONS, "modelled") for number in range(num_replicas)]
        for replica in replicas:
            (LOGS / f"fleet-{replica.name}.log").unlink(missing_ok=True)
            stack.push_async_callback(replica.stop)
            await replica.start()
        router = EnvoyRouter(replicas, directory, "")
        before = set(psutil.Process().children())
        url = await stack.enter_async_context(router.running())
        others = [*set(psutil.Process().children()) - before, psutil.Process(valkey.pid)]
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        yield RealFleet(replicas, url, redis, others)


def _is_engine(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and "evospec.engine.process" in process.cmdline()
