"""Short forms of ``benchmarks.attack``: what others are served, and what the attacker is refused."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.attack import compiling, disconnects, masks, starving
from benchmarks.attack.clients import CHAT, FOUR_TOKENS, Answer, ask, with_schema
from benchmarks.attack.determinism import compare
from benchmarks.attack.forge_channel import channel_options, forge
from benchmarks.attack.grammar_fuzz import BODY, satisfies
from benchmarks.attack.http_fuzz import Exchange
from benchmarks.attack.keyless import endless_bodies, slow_bodies
from benchmarks.attack.random_schemas import RandomSchemas
from benchmarks.attack.server import ATTACKER, LIMITED, MODEL, REQUESTS_PER_MINUTE, VICTIM, Server, write_keys
from benchmarks.attack.varied_requests import varied_requests
from benchmarks.common.threads import beside
from tests.running_server import AT_ONCE, SMALL, RunningServer

LaunchServer = Callable[..., RunningServer]
TIMEOUT = 60.0
ROOM = ["--kv-max-bytes", str(96 * 1024**2), "--engine.model.max_model_len", "2048"]
"""For 4,000 tokens: little, so that it is soon full."""
LONG = {**starving.LONG, "max_tokens": 2000}
NUM_COMPARED, FEW_TOKENS = 16, 20
"""Answers that are compared, and tokens of each: what may differ does so from the first."""
TINY_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def attackable(running: RunningServer, keys: dict[str, str], log: Path) -> Server:
    return Server(running.base_url, psutil.Process(running.process.pid), keys, log)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Server]:
    """A server that all attacks here share: none may leave it worse than it was."""
    directory = tmp_path_factory.mktemp("attacked")
    keys = write_keys(directory / "keys.toml")
    log = directory / "log.jsonl"
    options = [*AT_ONCE, "--keys-file", str(directory / "keys.toml")]
    running = RunningServer(log, [*SMALL, *ROOM, *options])
    try:
        running.wait_until_healthy()
        yield attackable(running, keys, log)
    finally:
        running.stop()


@pytest.fixture
def victim_is_served(attacked: Server) -> Iterator[None]:
    """Whatever the test did, the victim is served afterwards by the same engine, and nothing has crashed."""
    yield
    assert ask(attacked, VICTIM, FOUR_TOKENS, timeout=TIMEOUT).is_served
    assert attacked.metric("evospec:process_restarts_total", process="engine") == 0
    assert attacked.tracebacks() == 0


@contextmanager
def in_background(work: Callable[[], Answer]) -> Iterator[list[Answer]]:
    """``work`` beside the block; its answer is in the list once the block has ended."""
    answers: list[Answer] = []
    with beside(lambda _: answers.append(work())):
        yield answers


@pytest.mark.usefixtures("victim_is_served")
@pytest.mark.parametrize("schemas", masks.SCHEMAS.values(), ids=masks.SCHEMAS.keys())
@pytest.mark.parametrize("which", [0, -1], ids=["costliest", "cheapest"])
def test_costly_masks_end_alone(attacked: Server, schemas: list[dict[str, Any]], which: int) -> None:
    body = {**masks.BODY, "max_tokens": 8}  # of 160 sequences
    with in_background(lambda: ask(attacked, ATTACKER, with_schema(body, schemas[which]))) as answers:
        served = [ask(attacked, VICTIM, FOUR_TOKENS, timeout=TIMEOUT).is_served for _ in range(8)]
    assert all(served)
    assert answers[0].status in (200, 400), answers[0]


@pytest.mark.usefixtures("victim_is_served")
@pytest.mark.parametrize(
    ("schema", "patience", "status"),
    [(compiling.SLOW[0], 120.0, 400), (compiling.SLOW[1], 1.5, 0)],
    ids=["to the end", "client goes"],
)
def test_schemas_that_compile_long_hold_up_nobody(
    attacked: Server, schema: dict[str, Any], patience: float, status: int
) -> None:
    """They may compute for ten seconds until they are refused (each: ``tests/integration/test_grammar.py``)."""
    slow = with_schema(compiling.BODY, schema)
    with in_background(lambda: ask(attacked, ATTACKER, slow, CHAT, patience)) as answers:
        tiny = ask(attacked, VICTIM, with_schema(compiling.BODY, TINY_SCHEMA), CHAT, TIMEOUT)
    assert tiny.is_served
    assert answers[0].status == status, answers[0]


@pytest.mark.usefixtures("victim_is_served")
@pytest.mark.parametrize("of", ["kv", "slots"])
def test_a_newcomer_is_served_beside_all_that_another_tenant_asks_for(attacked: Server, of: str) -> None:
    def is_full() -> bool:
        if of == "slots":
            return attacked.metric("evospec:num_requests_waiting_by_tenant", tenant=ATTACKER) > 0
        return attacked.metric("evospec:kv_blocks_used") > attacked.metric("evospec:kv_blocks_total") / 2

    with starving.open_stream(attacked, ATTACKER, LONG if of == "kv" else starving.MANY):
        while not is_full():
            time.sleep(0.05)
        answers = [ask(attacked, VICTIM, FOUR_TOKENS, timeout=TIMEOUT) for _ in range(3)]
        assert attacked.metric("evospec:num_requests_running") > 1
    assert all(answer.is_served for answer in answers)


@pytest.mark.usefixtures("victim_is_served")
def test_bodies_without_a_key_open_no_limit(attacked: Server) -> None:
    start = time.monotonic()
    with endless_bodies(attacked, 2), slow_bodies(attacked, 20), ThreadPoolExecutor(20) as pool:
        body = {"model": MODEL, "prompt": "hi"}
        answers = pool.map(lambda _: ask(attacked, LIMITED[0], body, "/tokenize", TIMEOUT), range(60))
        statuses = Counter(answer.status for answer in answers)
    refilled = (time.monotonic() - start) * REQUESTS_PER_MINUTE / 60
    assert REQUESTS_PER_MINUTE <= statuses[200] <= REQUESTS_PER_MINUTE + refilled
    assert statuses[429] == 60 - statuses[200]


@pytest.mark.usefixtures("victim_is_served")
def test_the_connection_of_a_refused_body_ends(attacked: Server) -> None:
    with socket.create_connection(attacked.address, timeout=TIMEOUT) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert b" 401 " in answer.splitlines()[0]


@pytest.mark.usefixtures("victim_is_served")
def test_clients_that_go_away_leave_nothing(attacked: Server) -> None:
    figures = disconnects.measure(attacked, num_streams=8, num_leavers=24, patience=1.0)
    assert figures["gone"] > 0
    assert (figures["failed"], figures["blocks_left"], figures["sequences_left"]) == (0, 0, 0)


@pytest.mark.usefixtures("victim_is_served")
def test_random_schemas_are_kept_or_refused(attacked: Server) -> None:
    schemas = RandomSchemas(seed=7)
    asked = [schemas.next() for _ in range(40)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda schema: ask(attacked, ATTACKER, with_schema(BODY, schema)), asked))
    for schema, answer in zip(asked, answers, strict=True):
        assert answer.status in (200, 400), (schema, answer)
        if answer.is_served and answer.body["choices"][0]["finish_reason"] == "stop":
            text = answer.body["choices"][0]["text"]
            assert satisfies(text, schema) is not False, (schema, text)


@pytest.mark.usefixtures("victim_is_served")
def test_broken_http_is_refused(attacked: Server) -> None:
    exchange = Exchange(attacked, seed=7)
    exchange.run(3)
    assert exchange.statuses[400] > 0
    assert not [status for status in exchange.statuses if status >= 500]


@pytest.mark.usefixtures("victim_is_served")
def test_nothing_but_the_request_changes_an_answer(attacked: Server) -> None:
    requests = [
        (path, {**body, "max_tokens": min(body["max_tokens"], FEW_TOKENS)})
        for path, body in varied_requests(seed=7, count=NUM_COMPARED)
    ]
    counts = asyncio.run(compare(attacked.url, attacked.keys[VICTIM], requests))
    assert counts == {"compared": 6 * NUM_COMPARED, "changed": 0, "status_changed": 0, "unserved": 0}


def test_a_forged_channel_stops_neither_the_engine_nor_its_start(launch_server: LaunchServer, tmp_path: Path) -> None:
    """Two ways to forge it; of all ways see ``tests/unit/test_forged_channels.py``."""
    channel, options = channel_options(tmp_path)
    running = launch_server(*options)
    for mode in ("buffer 1000000", "bad text"):
        forge(channel, mode)
        server = attackable(running, {VICTIM: "none"}, tmp_path)
        assert ask(server, VICTIM, FOUR_TOKENS, timeout=TIMEOUT).is_served
    running.stop()
    forge(channel, "bad text")
    last = launch_server(*options)
    assert ask(attackable(last, {VICTIM: "none"}, tmp_path), VICTIM, FOUR_TOKENS, timeout=TIMEOUT).is_served
