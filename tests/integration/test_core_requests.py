"""Requests that the engine cannot take, beside one that it can: nobody else notices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from engine.config import EngineConfig
from engine.messages import EngineMessage, EngineReady, EngineRequest, Hello, SamplingParams
from engine.models.verify import Verification
from engine.process import EngineProcess
from engine.sampling.sampler import Sampler
from tests.tiny_drafts import CLIENT, Engine, Setting
from tests.tiny_models import make_directory

PROMPT = list(range(2, 40))
GREEDY = SamplingParams(max_tokens=20, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(make_directory(tmp_path / "model"), Setting())


def test_an_id_used_twice_leaves_the_first_request_alone(engine: Engine) -> None:
    [expected] = engine.generate([PROMPT], [GREEDY])
    request_id = engine.add(PROMPT, GREEDY)
    for _ in range(5):
        engine.step()
    message = EngineRequest(request_id=request_id, prompt_token_ids=[3], sampling=GREEDY, tenant="tests")
    engine.core.add(CLIENT, message)
    while engine.is_busy:
        engine.step()
    assert engine.output(request_id) == expected
    assert not engine.core.stats().blocks_used


def test_a_request_that_the_sampler_cannot_take_is_refused_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Sampler.add

    def fail(sampler: Sampler, request: Any) -> None:
        if request.tenant == "unlucky":
            raise RuntimeError("a library failed")
        add(sampler, request)

    monkeypatch.setattr(Sampler, "add", fail)
    check_refused_alone(engine, PROMPT, "unlucky", "internal")
    assert (engine.core.stats().blocks_used, engine.core.stats().num_waiting) == (0, 0)


@pytest.mark.parametrize("prompt", [[], [-1, 3], [3, 10**9]])
def test_a_prompt_that_no_model_could_read_is_refused_alone(engine: Engine, prompt: list[int]) -> None:
    check_refused_alone(engine, prompt, "tests", "invalid")


def check_refused_alone(engine: Engine, prompt: list[int], tenant: str, kind: str) -> None:
    """Beside a request whose answer is what it is without."""
    message = EngineRequest(request_id="other", prompt_token_ids=prompt, sampling=GREEDY, tenant=tenant)
    [expected] = engine.generate([PROMPT], [GREEDY])
    request_id = engine.add(PROMPT, GREEDY)
    engine.core.add(CLIENT, message)
    outputs, _ = engine.core.step()
    refused = [output for output in outputs[CLIENT] if output.request_id == message.request_id]
    assert [(output.finish_reason, output.error_kind) for output in refused] == [("error", kind)]
    received = [token for output in outputs[CLIENT] if output.request_id == request_id for token in output.token_ids]
    while engine.is_busy:
        engine.step()
    assert received + engine.output(request_id) == expected


def test_bytes_that_are_no_message_are_left_out(engine: Engine, tmp_path: Path) -> None:
    """The step loop goes on, and hears the next message of the same client."""
    config = EngineConfig(address=f"ipc://{tmp_path}/engine.sock")
    process = EngineProcess(config, engine.core, "tiny", Verification({}))
    with zmq.Context.instance().socket(zmq.DEALER) as client:
        client.connect(config.address)
        for payload in (b"", b"\xc1", b"\x92\xa5hello", msgspec.msgpack.encode({"type": "unknown"})):
            client.send(payload)
        client.send(msgspec.msgpack.encode(Hello()))
        deadline = time.monotonic() + 20
        while not client.poll(0):
            assert time.monotonic() < deadline
            process._receive(0.01)
        ready = msgspec.msgpack.decode(client.recv(), type=EngineMessage)
    process._socket.close()
    assert isinstance(ready, EngineReady)
    assert ready.model == "tiny"
