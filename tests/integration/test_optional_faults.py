"""Faults of drafting, learning and the target's pass: what they cost, and that they end no more than they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
import zmq
from structlog.testing import capture_logs

from evospec.engine import process
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import EngineOutput, EngineOutputs, EngineRequest, SamplingParams, SessionState
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.verify import FileCheck
from evospec.engine.online.verify_log import VerifyLog
from evospec.engine.optional_parts import FIRST_PAUSE, MOST_FAULTS, OptionalParts
from evospec.engine.process import EngineProcess
from evospec.engine.speculation.length.policy import Length
from evospec.engine.speculation.speculator import Speculator
from evospec.engine.step import DraftSlot, Proposal, Proposals
from tests.alignment import make_alignment
from tests.tiny_drafts import CLIENT, Engine, Setting, with_draft
from tests.tiny_models import VOCAB_SIZE, make_directory

PROMPTS = [[3 + number, 5, 7, 9, 11, 5, 7, 9] * 6 for number in range(4)]
SAMPLING = [SamplingParams(max_tokens=24, seed=n, temperature=0.8 * (n % 2), ignore_eos=True) for n in range(4)]
SESSIONS = [SessionState() for _ in PROMPTS]


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """What is logged: structlog, not configured, would draw each exception with all its variables, which takes long."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target", hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> list[list[int]]:
    return Engine(files, Setting()).generate(PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def speculation(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> SpeculationConfig:
    return with_draft(files, tmp_path_factory.mktemp("draft") / "draft")


@pytest.fixture
def engine(files: ModelFiles, speculation: SpeculationConfig, tmp_path: Path, valkey_url: str) -> Engine:
    """With all optional parts: a draft, prompt lookup, vocabularies and a token log."""
    return Engine(files, Setting(), speculation, alignment=make_alignment(tmp_path, valkey_url, "lora"))


def speculator_of(engine: Engine) -> Speculator:
    assert isinstance(engine.core._drafter, Speculator)
    return engine.core._drafter


def verify_log_of(engine: Engine) -> VerifyLog:
    [log] = [one for one in engine.core._learners if isinstance(one, VerifyLog)]
    return log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of all ``OptionalParts``: its only number is the time."""
    now = [0.0]
    monkeypatch.setattr(OptionalParts.__init__, "__defaults__", (lambda: now[0],))
    return now


def raising(_: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    return fail


def too_many_lengths(function: Callable[..., list[Length]]) -> Callable[..., list[Length]]:
    return lambda *arguments: [*function(*arguments), Length(1)]


def absurd_lengths(function: Callable[..., list[Length]]) -> Callable[..., list[Length]]:
    return lambda *arguments: [Length(10**6 * (-1) ** place) for place, _ in enumerate(function(*arguments))]


def drafting(token_ids: Sequence[int]) -> Callable[..., Any]:
    """Drafts these tokens for all."""

    def propose(slots: Sequence[DraftSlot], *_: Any) -> Proposals:
        return {slot.request: Proposal([*token_ids]) for slot in slots}

    return lambda _: propose


FAULTS: dict[str, tuple[str, str, str, Callable[..., Any]]] = {
    "draft raises": ("draft", "_proposer", "propose", raising),
    "ids too large": ("draft", "_proposer", "propose", drafting([VOCAB_SIZE])),
    "ids negative": ("draft", "_proposer", "propose", drafting([-1])),
    "more drafts than fit": ("draft", "_proposer", "propose", drafting([5] * 500)),
    "features raise": ("draft", "_proposer", "learn", raising),
    "ends raise": ("draft", "_proposer", "end", raising),
    "lengths raise": ("lengths", "_policy", "lengths", raising),
    "too many lengths": ("lengths", "_policy", "lengths", too_many_lengths),
    "absurd lengths": ("", "_policy", "lengths", absurd_lengths),
    "cutting raises": ("lengths", "_policy", "worth_verifying", raising),
    "judging raises": ("lengths", "_policy", "record_drafts", raising),
    "vocabulary raises": ("vocabulary", "_vocab", "follow", raising),
    "snapshots raise": ("vocabulary", "_vocab", "finish", raising),
    "sources raise": ("vocabulary", "_vocab", "in_core", raising),
    "log raises": ("log", "_log", "learn", raising),
    "statistics raise": ("log", "_log", "add_stats", raising),
}
"""Part to which it is counted, "" for none; who does what; and what becomes of that."""


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_are_those_without_faults(
    engine: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Where each fifth call has the fault, and then where each has."""
    part, owner, name, make = FAULTS[fault]
    number, every = 0, 5
    target = verify_log_of(engine) if owner == "_log" else getattr(speculator_of(engine), owner)
    right = getattr(target, name)
    wrong = make(right)

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        return (right if number % every else wrong)(*arguments, **options)

    monkeypatch.setattr(target, name, call)
    sampling = [msgspec.structs.replace(one, logprobs=1) for one in SAMPLING]
    for every in (5, 1):
        number = 0
        engine.core._parts._records.clear()
        assert engine.generate(PROMPTS, sampling, sessions=SESSIONS) == expected
        assert number
        stats = engine.core.stats()
        assert set(stats.faults) == ({part} if part and number >= every else set())
        assert set(stats.switched_off) <= {part}


def test_a_part_that_was_switched_off_is_used_again(
    clock: list[float],
    logs: list[Any],
    engine: Engine,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(speculator_of(engine)._proposer, "propose", raising(print))
        assert engine.generate(PROMPTS, SAMPLING) == expected
    assert engine.core.stats().faults == {"draft": MOST_FAULTS}
    assert engine.core.stats().switched_off == ["draft"]
    told = [entry["part"] for entry in logs if "part" in entry]
    assert told == ["draft"] * (MOST_FAULTS + 1)  # the last says that it is switched off
    assert engine.generate(PROMPTS, SAMPLING) == expected
    assert engine.num_drafted == 0
    clock[0] += FIRST_PAUSE
    assert engine.generate(PROMPTS, SAMPLING) == expected
    assert engine.num_drafted > 0
    assert engine.core.stats().switched_off == []


@pytest.mark.parametrize("owner", ["_lookup", "_policy"])
def test_prompt_lookup_may_fail(
    files: ModelFiles,
    speculation: SpeculationConfig,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    owner: Literal["_lookup", "_policy"],
) -> None:
    """With lengths that adapt, as served; without either, too."""
    engine = Engine(files, Setting(), speculation.model_copy(update={"adaptive": True}))
    name = {"_lookup": "look", "_policy": "rests"}[owner]
    monkeypatch.setattr(getattr(speculator_of(engine), owner), name, raising(print))
    assert engine.generate(PROMPTS, SAMPLING) == expected
    assert engine.core.stats().switched_off == [{"_lookup": "lookup", "_policy": "lengths"}[owner]]


def outputs_of(engine: Engine, num_steps: int) -> list[EngineOutput]:
    return [output for _ in range(num_steps) for output in engine.core.step()[0][CLIENT]]


def test_a_step_of_the_target_that_fails_ends_the_requests_that_were_in_it(
    engine: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else's: the next requests get their answers from the same engine."""
    for number in range(2):
        engine.core.add(CLIENT, request(str(number)))
    outputs_of(engine, 3)
    with monkeypatch.context() as patch:
        patch.setattr(engine.core._runner, "execute", raising(print))
        outputs_of(engine, 1)
    ended = outputs_of(engine, 1)
    assert {(one.request_id, one.finish_reason, one.error_kind) for one in ended} == {
        (number, "error", "internal") for number in "01"
    }
    assert engine.core.stats().failed_steps == 1
    assert engine.generate(PROMPTS, SAMPLING) == expected


def test_an_engine_whose_every_step_fails_ends_to_be_restarted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.core._runner, "execute", raising(print))
    for number in range(2):
        engine.core.add(CLIENT, request(str(number)))
        engine.core.step()
    engine.core.add(CLIENT, request("2"))
    with pytest.raises(RuntimeError, match="injected"):
        engine.core.step()


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_token_ids=PROMPTS[0], sampling=SAMPLING[0], tenant="tests")


def test_a_server_that_does_not_read_ends_its_own_requests_only(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded, and the step loop never waits."""
    monkeypatch.setattr(process, "_MOST_UNSENT", 3)
    address = f"ipc://{tmp_path}/engine.sock"
    serving = EngineProcess(address, engine.core, FileCheck({}))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    deaf, other = (context.socket(zmq.DEALER) for _ in range(2))
    with deaf, other:
        for client, name in ((deaf, b"deaf"), (other, b"other")):
            client.setsockopt(zmq.IDENTITY, name)
            client.setsockopt(zmq.RCVHWM, 1)
            client.connect(address)
            client.send(msgspec.msgpack.encode(request("0")))
        while len(engine.core._scheduler.requests) < 2:
            serving._receive(1)
        message = EngineOutputs(epoch="e" * 1_000_000)
        for _ in range(100):
            serving._send(b"deaf", message)
        left = engine.core._scheduler.requests.values()
        assert [one.client_id for one in left] == [b"other"]
    serving._socket.close()


@torch.inference_mode()
def test_nothing_that_was_drafted_stays_of_a_step_whose_drafts_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a batch may have drafts when the rest fails: then nobody has any."""
    proposer = speculator_of(engine)._proposer
    right = proposer.propose

    def propose(slots: Sequence[DraftSlot], *arguments: Any) -> Proposals:
        right(slots, *arguments)
        raise RuntimeError("injected")

    monkeypatch.setattr(proposer, "propose", propose)
    engine.generate(PROMPTS[:2], SAMPLING[:2])
    assert engine.num_drafted == 0
