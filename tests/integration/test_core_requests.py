"""Requests that the engine cannot take, beside one that it can: nobody else notices."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file

from evospec.engine.config import SpeculationConfig
from evospec.engine.draft_vocab.snapshot import decode
from evospec.engine.messages import (
    EngineMessage,
    EngineOutput,
    EngineRequest,
    Grammar,
    Hello,
    SamplingParams,
    SessionState,
)
from evospec.engine.models.verify import FileCheck
from evospec.engine.process import EngineProcess
from evospec.engine.sampling.choose import SamplingState
from evospec.engine.verifier import Verifier
from tests.tiny_drafts import CLIENT, Engine, Setting, with_draft
from tests.tiny_models import VOCAB_SIZE, make_directory

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


def test_a_client_that_goes_away_leaves_no_request_that_waits_for_its_grammar(engine: Engine) -> None:
    engine.add(PROMPT, msgspec.structs.replace(GREEDY, grammar=Grammar("regex", "(a|b){40}c")))
    assert engine.core._grammars.waiting
    engine.core.abort_client(CLIENT)
    assert not engine.core._grammars.waiting


def test_a_request_that_is_aborted_tells_what_its_session_has_learned(tmp_path: Path) -> None:
    """A client that leaves in the middle of an answer has talked all the same."""
    files = make_directory(tmp_path / "model", hidden_size=128, head_dim=32)
    engine = Engine(files, Setting(), with_draft(files, tmp_path / "draft"))
    with_output, without = (engine.add(PROMPT, GREEDY, session=SessionState()) for _ in range(2))
    engine.abort(without)
    for _ in range(5):
        engine.step()
    engine.abort(with_output)
    output = engine.output(with_output)
    engine.step()
    assert list(engine.snapshots) == [with_output]
    learned = decode(engine.snapshots[with_output], engine.core.introduction.vocabulary, VOCAB_SIZE)
    assert learned.num_verified_tokens == len(output) > 0
    assert engine.core.stats().vocabularies_used == engine.core.stats().blocks_used == 0


def test_no_token_after_the_last_has_a_log_probability(tmp_path: Path) -> None:
    """Also where a stop token is in the middle of what was accepted."""
    files = make_directory(tmp_path / "model")
    itself = SpeculationConfig(method="draft_model", draft=str(files.path), num_speculative_tokens=4, adaptive=False)
    engine, outputs = Engine(files, Setting(), itself), list[EngineOutput]()
    [answer] = engine.generate([PROMPT], [GREEDY])
    for end in dict.fromkeys(answer):
        engine.add(PROMPT, msgspec.structs.replace(GREEDY, logprobs=0, stop_token_ids=(end,)))
        while engine.is_busy:
            of_step = engine.core.step()[0]
            engine.take(of_step)
            outputs += of_step[CLIENT]
    assert any(output.num_draft_tokens > len(output.token_ids) > 1 for output in outputs)
    assert all(len(output.logprobs or []) == len(output.token_ids) for output in outputs)


def test_a_request_that_the_verifier_cannot_take_is_refused_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Verifier.add

    def fail(verifier: Verifier, request: Any) -> None:
        if request.tenant == "unlucky":
            raise RuntimeError("a library failed")
        add(verifier, request)

    monkeypatch.setattr(Verifier, "add", fail)
    check_refused_alone(engine, PROMPT, "unlucky", "internal")
    assert (engine.core.stats().blocks_used, engine.core.stats().num_waiting) == (0, 0)


def test_a_prompts_tokens_are_counted_for_penalties_once_it_has_been_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes as long as reading it: those that run would wait for all that only wait."""
    counted: list[SamplingParams] = []

    class CountedState(SamplingState):
        def __init__(self, params: SamplingParams, prompt_token_ids: list[int]) -> None:
            counted.append(params)
            super().__init__(params, prompt_token_ids)

    monkeypatch.setattr("evospec.engine.sampling.sampler.SamplingState", CountedState)
    engine = Engine(make_directory(tmp_path / "model"), Setting(max_num_seqs=1))
    sampling = [SamplingParams(max_tokens=4, seed=seed, repetition_penalty=1.5, ignore_eos=True) for seed in range(3)]
    for number, params in enumerate(sampling):
        engine.add(PROMPT, params)
        assert not counted, number
    for number in range(3):
        engine.step()
        assert counted == sampling[: number + 1]
        for _ in range(3):
            engine.step()
    assert not engine.is_busy


@pytest.mark.parametrize("prompt", [[], [-1, 3], [3, 10**9]])
def test_a_prompt_that_no_model_could_read_is_refused_alone(engine: Engine, prompt: list[int]) -> None:
    check_refused_alone(engine, prompt, "tests", "invalid")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("method", ["none", "ngram"])
def test_a_damaged_model_gives_no_answer(tmp_path: Path, name: str, method: Literal["none", "ngram"]) -> None:
    """Some numbers of one tensor are lost: its requests end with an error, which is counted."""
    files = make_directory(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(files.path / "model.safetensors")
    tensors[name].view(torch.uint8).flatten()[:2000] = 0xFF
    save_file(tensors, files.path / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(files, Setting(), SpeculationConfig(method=method))
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_tokens=20, seed=0, temperature=temperature)
        message = EngineRequest(request_id="r", prompt_token_ids=PROMPT, sampling=sampling, tenant="tests")
        engine.core.add(CLIENT, message)
        outputs: list[EngineOutput] = []
        while not any(output.finish_reason for output in outputs):
            outputs += engine.core.step()[0][CLIENT]
        assert (outputs[-1].finish_reason, outputs[-1].error_kind) == ("error", "internal")
        assert not [token for output in outputs for token in output.token_ids]
    stats = engine.core.stats()
    assert (stats.nonfinite_sequences, stats.blocks_used) == (2, 0)


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


def test_a_flood_of_requests_is_taken_a_little_at_a_time(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left in the socket is found without another message, in order. Each message takes 2 ms here."""
    now, taken = 0.0, []

    def handle(process: EngineProcess, client: bytes, payload: bytes) -> None:
        nonlocal now
        now += 0.002
        taken.append(payload)

    monkeypatch.setattr("evospec.engine.process.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(EngineProcess, "_handle", handle)
    address = f"ipc://{tmp_path}/engine.sock"
    process = EngineProcess(address, engine.core, FileCheck({}))
    sent = [bytes([number]) for number in range(20)]
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with socket as client:
        client.connect(address)
        for payload in sent:
            client.send(payload)
        while len(taken) < len(sent):
            num_before = len(taken)
            process._receive(20)
            assert num_before < len(taken) <= num_before + 3
    process._socket.close()
    assert taken == sent


def test_bytes_that_are_no_message_are_left_out(engine: Engine, tmp_path: Path) -> None:
    """The step loop goes on, and hears the next message of the same client."""
    address = f"ipc://{tmp_path}/engine.sock"
    process = EngineProcess(address, engine.core, FileCheck({}))
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with socket as client:
        client.connect(address)
        for payload in (b"", b"\xc1", b"\x92\xa5hello", msgspec.msgpack.encode({"type": "unknown"})):
            client.send(payload)
        client.send(msgspec.msgpack.encode(Hello()))
        deadline = time.monotonic() + 20
        while not client.poll(0):
            assert time.monotonic() < deadline
            process._receive(0.01)
        ready = msgspec.msgpack.decode(client.recv(), type=EngineMessage)
    process._socket.close()
    assert ready == engine.core.introduction
