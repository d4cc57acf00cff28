"""Work of requests in shares of their tenants: what one tenant sends keeps no other waiting, and what waits is bounded.

Nothing here is decided by time: threads wait for events that the tests set.
"""

from __future__ import annotations

import asyncio
import json
import pkgutil
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from evospec.engine.messages import EngineOutput, EngineRequest, TokenLogprob
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server import body_room
from evospec.server.body_room import BodyRoom
from evospec.server.engine_client import Overloaded
from evospec.server.schemas.completions import CompletionChoice
from evospec.server.tenants import hash_key
from evospec.server.work_shares import SMALL, WorkShares
from tests.integration.running_api import Api
from tests.integration.scripted_engine import Script

BIG = 2 * SMALL
LONG_TEXT = "a " * SMALL


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Gate:
    """Work that begins, and goes on when it is let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._go_on = threading.Semaphore(0)

    def pass_through(self, name: str = "") -> str:
        self.begun.append(name)
        assert self._go_on.acquire(timeout=20)
        return name

    def open(self, times: int = 1) -> None:
        self._go_on.release(times)


@pytest.fixture
def shares() -> Any:
    shares = WorkShares()
    yield shares
    shares.close()


async def test_a_tenant_with_long_work_has_one_thread_and_another_goes_on_meanwhile(shares: WorkShares) -> None:
    gate = Gate()
    jobs = [asyncio.create_task(shares.run("acme", BIG, gate.pass_through, name)) for name in "xyz"]
    await until(lambda: gate.begun)
    assert await shares.run("bravo", BIG, lambda: "served") == "served"
    assert gate.begun == ["x"]
    gate.open(3)
    assert await asyncio.gather(*jobs) == ["x", "y", "z"]


async def test_a_small_job_waits_for_nobody(shares: WorkShares) -> None:
    gate = Gate()
    jobs = [asyncio.create_task(shares.run(name, BIG, gate.pass_through)) for name in ("acme", "charlie", "delta")]
    await until(lambda: len(gate.begun) == 2)  # no thread is free
    assert await shares.run("bravo", SMALL, threading.get_ident) == threading.get_ident()
    gate.open(3)
    await asyncio.gather(*jobs)


async def test_a_cancelled_job_never_begins_and_one_that_runs_keeps_its_tenants_place(shares: WorkShares) -> None:
    gate = Gate()
    running, waiting, last = (
        asyncio.create_task(shares.run("acme", BIG, gate.pass_through, name)) for name in ("running", "waiting", "last")
    )
    await until(lambda: gate.begun)
    running.cancel()
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    assert await shares.run("bravo", BIG, lambda: "served") == "served"
    assert gate.begun == ["running"]
    gate.open(2)
    assert await last == "last"
    assert gate.begun == ["running", "last"]


async def test_what_work_raises_reaches_its_caller_and_the_next_job_runs(shares: WorkShares) -> None:
    with pytest.raises(ZeroDivisionError):
        await shares.run("acme", BIG, lambda: 1 / 0)
    assert await shares.run("acme", BIG, lambda: 1) == 1


async def holding(room: BodyRoom, tenant: str, size: int, release: asyncio.Event, entered: list[int]) -> None:
    async with room.hold(tenant, size):
        entered.append(size)
        await release.wait()


async def test_bodies_come_in_in_their_order_as_room_allows_and_other_tenants_have_their_own() -> None:
    room, release, entered = BodyRoom(10), asyncio.Event(), list[int]()
    first = asyncio.create_task(holding(room, "acme", 6, release, entered))
    rest = [asyncio.create_task(holding(room, "acme", size, asyncio.Event(), entered)) for size in (5, 1)]
    await until(lambda: entered == [6])
    async with room.hold("bravo", 10):
        assert entered == [6]  # the last would fit, but it is not its turn
    release.set()
    await first
    await until(lambda: entered == [6, 5, 1])
    for task in rest:
        task.cancel()


async def test_room_that_is_not_needed_after_all_is_the_nexts() -> None:
    room, entered = BodyRoom(10), list[int]()
    async with room.hold("acme", 10) as shrink:
        second = asyncio.create_task(holding(room, "acme", 7, asyncio.Event(), entered))
        third = asyncio.create_task(holding(room, "acme", 2, asyncio.Event(), entered))
        await asyncio.sleep(0)
        shrink(3)
        await until(lambda: entered == [7])
    await until(lambda: entered == [7, 2])
    for task in (second, third):
        task.cancel()


async def test_who_gives_up_waiting_for_room_leaves_it_to_the_next() -> None:
    room, entered = BodyRoom(10), list[int]()
    release = asyncio.Event()
    first = asyncio.create_task(holding(room, "acme", 10, release, entered))
    await until(lambda: entered)
    given_up, admitted, last = (
        asyncio.create_task(holding(room, "acme", size, release, entered)) for size in (10, 9, 8)
    )
    await asyncio.sleep(0)
    given_up.cancel()
    release.set()
    await first  # gives its room to the second
    admitted.cancel()
    await last
    async with asyncio.timeout(20), room.hold("acme", 10):
        pass


async def test_too_many_that_wait_for_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_room, "MAX_WAITING", 1)
    room, release, entered = BodyRoom(10), asyncio.Event(), list[int]()
    tasks = [asyncio.create_task(holding(room, "acme", 10, release, entered)) for _ in range(2)]
    await until(lambda: entered)
    with pytest.raises(Overloaded):
        async with room.hold("acme", 1):
            pass
    release.set()
    await asyncio.gather(*tasks)


def one_token(request: EngineRequest) -> Any:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="stop")


def silent(request: EngineRequest) -> Any:
    return ()


@pytest.fixture
def serve_two(serve: Any) -> Callable[..., AbstractAsyncContextManager[Api]]:
    """A server for the tenants acme and bravo, whose keys are their names; small bodies fill a tenant's room."""

    @asynccontextmanager
    async def serve_them(*options: str, script: Script = one_token) -> AsyncIterator[Api]:
        keys = ",".join(f"{name}={hash_key(name)}" for name in ("acme", "bravo"))
        async with serve(script, "--auth.keys", keys, *options) as api:
            yield api

    return serve_them


def tokenize(api: Api, tenant: str, prompt: str) -> asyncio.Task[httpx.Response]:
    headers = {"Authorization": f"Bearer {tenant}"}
    return asyncio.create_task(api.client.post("/tokenize", json={"prompt": prompt}, headers=headers))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Texts of acme wait in the tokenizer: they are those with an a."""
    gate, encode = Gate(), Tokenizer.encode

    def encode_behind_gate(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        if "a" in text:
            gate.pass_through(text)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", encode_behind_gate)
    monkeypatch.setattr("evospec.server.params.check_length", lambda *_: None)
    return gate


async def test_while_one_tenants_texts_are_tokenised_another_is_served(serve_two: Any, gate: Gate) -> None:
    async with serve_two() as api:
        attacker = [tokenize(api, "acme", LONG_TEXT) for _ in range(8)]
        await until(lambda: gate.begun)
        short, long = await tokenize(api, "bravo", "b b"), await tokenize(api, "bravo", "b " * SMALL)
        assert [answer.status_code for answer in (short, long)] == [200, 200]
        assert len(gate.begun) == 1
        gate.open(8)
        assert {answer.status_code for answer in await asyncio.gather(*attacker)} == {200}


async def test_bodies_beyond_a_tenants_room_are_not_read_until_others_are_answered(serve_two: Any, gate: Gate) -> None:
    async with serve_two("--http.max_body_bytes", str(len(LONG_TEXT) + 100)) as api:  # four of them
        attacker = [tokenize(api, "acme", LONG_TEXT) for _ in range(8)]
        rooms = api.app.state.serving.bodies._rooms
        await until(lambda: "acme" in rooms and rooms["acme"].num_waiting == 4)
        assert (await tokenize(api, "bravo", "b " * SMALL)).status_code == 200
        gate.open(8)
        assert {answer.status_code for answer in await asyncio.gather(*attacker)} == {200}
        assert rooms["acme"].used == 0


async def test_a_client_that_goes_away_leaves_the_queue(serve_two: Any, gate: Gate) -> None:
    async with serve_two() as api:
        first, second = tokenize(api, "acme", LONG_TEXT), tokenize(api, "acme", LONG_TEXT + "second")
        await until(lambda: gate.begun)
        waiting = api.app.state.serving.bodies._rooms["acme"]
        await until(lambda: waiting.used > 2 * len(LONG_TEXT))
        second.cancel()
        await until(lambda: waiting.used < 2 * len(LONG_TEXT))
        third = tokenize(api, "acme", LONG_TEXT + "third")
        gate.open(2)
        assert [answer.status_code for answer in await asyncio.gather(first, third)] == [200, 200]
    assert gate.begun == [LONG_TEXT, LONG_TEXT + "third"]


async def test_a_body_in_chunks_holds_only_its_own_length_until_it_is_answered(serve_two: Any) -> None:
    async def one_chunk() -> AsyncIterator[bytes]:
        yield b'{"model": "tiny", "prompt": "The dog"}'

    headers = {"Authorization": "Bearer acme", "Content-Type": "application/json"}
    async with serve_two(script=silent) as api:
        asked = [
            asyncio.create_task(api.client.post("/v1/completions", content=one_chunk(), headers=headers))
            for _ in range(9)  # more than would have room if each were as long as may be
        ]
        await until(lambda: len(api.engine.requests) == 9)
        large = b'{"prompt": "b"}' + b" " * SMALL
        assert (await api.client.post("/tokenize", content=large, headers=headers)).status_code == 200
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await until(lambda: api.app.state.serving.bodies._rooms["acme"].used == 0)


async def in_chunks() -> AsyncIterator[bytes]:
    yield b'{"prompt":'
    yield b'"b"}'


async def test_a_large_body_names_its_wrong_field_as_a_small_one_does(serve_two: Any) -> None:
    async with serve_two() as api:
        headers = {"Authorization": "Bearer bravo"}
        wrong = {"model": "tiny", "prompt": LONG_TEXT, "stop": ["x", 1], "n": 1}
        answers = [
            await api.client.post("/v1/completions", json={**wrong, **change}, headers=headers)
            for change in ({}, {"prompt": "b"})
        ]
        too_many = await api.client.post("/v1/completions", json={**wrong, "stop": [[]] * 70_000}, headers=headers)
        undeclared = await api.client.post("/tokenize", content=in_chunks(), headers=headers)
    assert [answer.json()["error"]["param"] for answer in answers] == ["stop.1", "stop.1"]
    assert (too_many.status_code, "lists and objects" in too_many.text) == (400, True)
    assert undeclared.status_code == 400  # it is JSON, but does not say so


@pytest.mark.parametrize(
    ("path", "maker"),
    [("/metrics", "evospec.server.metrics.generate_latest"), ("/openapi.json", "evospec.server.openapi.get_openapi")],
)
async def test_while_the_server_describes_itself_others_are_served(
    serve: Any, monkeypatch: pytest.MonkeyPatch, path: str, maker: str
) -> None:
    gate, make = Gate(), pkgutil.resolve_name(maker)

    def make_behind_gate(*arguments: Any, **options: Any) -> Any:
        gate.pass_through()
        return make(*arguments, **options)

    async with serve(one_token) as api:
        monkeypatch.setattr(maker, make_behind_gate)
        asked = [asyncio.create_task(api.client.get(path)) for _ in range(2)]
        await until(lambda: gate.begun)
        assert (await api.post("/v1/completions")).status_code == 200
        assert len(gate.begun) == 1
        gate.open(4)
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


@pytest.mark.parametrize(
    ("path", "field", "maker"),
    [
        ("/v1/completions", "prompt", "evospec.server.routes.completions.tokenize_prompts"),
        ("/v1/embeddings", "input", "evospec.server.routes.embeddings.tokenize_prompts"),
        ("/v1/chat/completions", "messages", "evospec.server.chat_generation.encode_messages"),
        ("/v1/messages", "messages", "evospec.server.chat_generation.encode_messages"),
        ("/v1/responses", "input", "evospec.server.chat_generation.encode_messages"),
        ("/tokenize", "prompt", "evospec.server.routes.tokens.encode_text"),
    ],
)
async def test_what_a_long_body_asks_is_tokenized_beside_the_event_loop(
    serve: Any, monkeypatch: pytest.MonkeyPatch, path: str, field: str, maker: str
) -> None:
    threads, make = set[int](), pkgutil.resolve_name(maker)

    def watched(*arguments: Any, **options: Any) -> Any:
        threads.add(threading.get_ident())
        return make(*arguments, **options)

    monkeypatch.setattr(maker, watched)
    asked = [{"role": "user", "content": "Hi"}] if field == "messages" else "Hi"
    body = json.dumps({"model": "tiny", field: asked} | ({"max_tokens": 1} if path == "/v1/messages" else {}))
    async with serve(one_token) as api:
        await api.client.post(path, content=body + " " * BIG, headers={"Content-Type": "application/json"})
    assert threads
    assert threading.get_ident() not in threads


def many_logprobs(request: EngineRequest) -> Any:
    entries = [TokenLogprob(300, -0.5, [(300, -0.5), (301, -1.5)])] * 100
    yield EngineOutput(request_id=request.request_id, token_ids=[300] * 100, logprobs=entries, finish_reason="length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "logprobs"), [("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}), ("/v1/completions", {})]
)
async def test_a_long_answer_is_written_out_beside_the_event_loop(
    serve: Any, monkeypatch: pytest.MonkeyPatch, path: str, logprobs: dict[str, Any], stream: bool
) -> None:
    threads: set[int] = set()

    def finite(logprob: float) -> float:
        threads.add(threading.get_ident())
        return logprob

    monkeypatch.setattr("evospec.server.logprobs._finite", finite)
    async with serve(many_logprobs) as api:
        answer = await api.post(path, max_tokens=20, stream=stream, **(logprobs or {"logprobs": 2}))
    assert answer.status_code == 200
    assert answer.text.count("-1.5") == 100
    assert threads
    assert threading.get_ident() not in threads


class WatchedBackend:
    """A tokenizer's backend that notes which threads decode, and how often it has begun and ended."""

    def __init__(self, backend: Any) -> None:
        self.threads, self.begun, self.ended = set[int](), 0, 0
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return self._watch(getattr(self._backend, name)) if "decode" in name else getattr(self._backend, name)

    def _watch(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.threads.add(threading.get_ident())
            self.begun += 1
            result = decode(*arguments, **options)
            self.ended += 1
            return result

        return watched


async def test_prompts_to_echo_are_decoded_once_and_written_out_beside_the_event_loop(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = set[int]()

    def choice(**fields: Any) -> CompletionChoice:
        writers.add(threading.get_ident())
        return CompletionChoice(**fields)

    monkeypatch.setattr("evospec.server.routes.completions.CompletionChoice", choice)
    prompts = [[300 + number] * 60 for number in range(30)]
    async with serve(one_token) as api:
        tokenizer = api.app.state.serving.tokenizer
        backend = tokenizer.backend = WatchedBackend(tokenizer.backend)
        answer = await api.post("/v1/completions", prompt=prompts, n=4, echo=True, max_tokens=1)
        texts = [api.tokenizer.decode([*prompt, 300]) for prompt in prompts for _ in range(4)]
    assert [one["text"] for one in answer.json()["choices"]] == texts
    assert backend.begun == len(prompts)
    assert threading.get_ident() not in backend.threads | writers


async def test_the_event_loop_goes_on_while_ids_are_decoded(serve: Any) -> None:
    async with serve(silent) as api:
        tokenizer = api.app.state.serving.tokenizer
        backend = tokenizer.backend = WatchedBackend(tokenizer.backend)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # a thread goes on only where another lets it
        try:
            saw_it_run = [await sees_decoding(api, backend) for _ in range(5)]  # a busy machine may let it miss one
        finally:
            sys.setswitchinterval(interval)
    assert True in saw_it_run


async def sees_decoding(api: Api, backend: WatchedBackend) -> bool:
    """Whether the event loop runs between the beginning and the end of a long decoding."""
    begun = backend.begun
    asked = asyncio.create_task(api.client.post("/detokenize", json={"tokens": [300] * 2**17}))
    await until(lambda: backend.begun > begun)
    is_decoding = backend.ended < backend.begun
    assert (await asked).status_code == 200
    return is_decoding


SEQUENCES = {"prompt": ["x"] * 8, "n": 16, "max_tokens": 8}


async def test_outputs_of_many_sequences_in_one_step_all_arrive(serve: Any) -> None:
    async with serve(silent) as api:
        asked = asyncio.create_task(api.post("/v1/completions", **SEQUENCES))
        await until(lambda: len(api.engine.requests) == 128)
        ids = [request.request_id for request in api.engine.requests]
        await api.engine.send(*(EngineOutput(request_id=one, token_ids=[300]) for one in ids))
        await api.engine.send(*(EngineOutput(request_id=one, token_ids=[301], finish_reason="stop") for one in ids))
        answer = (await asked).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
    assert {choice["text"] for choice in answer["choices"]} == {api.tokenizer.decode([300, 301])}


async def test_what_came_before_the_engine_died_is_sent_before_the_error(serve: Any) -> None:
    """What ZMQ has not handed over when a connection ends, it drops: so the engine dies once its outputs are here."""
    async with serve(silent) as api:
        client = api.app.state.serving.engine
        asked = asyncio.create_task(api.events("/v1/completions", **SEQUENCES))
        await until(lambda: len(api.engine.requests) == 128)
        ids = [request.request_id for request in api.engine.requests]
        last_message = client.last_message
        await api.engine.send(*(EngineOutput(request_id=one, token_ids=[300]) for one in ids))
        await until(lambda: client.last_message > last_message)
        await api.engine.die()
        events = await asked
    assert [event["choices"][0]["index"] for event in events[:-1]] == list(range(128))
    assert events[-1]["error"]["code"] == "engine_unavailable"
