"""Answers that nobody has asked for: a real engine, worker and Valkey, and a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from evospec.adapters.alignment import synthetic
from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.core import Outputs
from evospec.engine.messages import EngineOutput, EngineRequest, SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.verify import FileCheck
from evospec.engine.online.verify_log import VerifyLog
from evospec.engine.process import EngineProcess
from tests.alignment import read_records
from tests.integration import test_growing
from tests.integration.test_growing import FOUR_DRAFTS, OWNER, make_worker, serve
from tests.tiny_drafts import CLIENT, Engine, Setting
from tests.tiny_models import make_directory

files, config = test_growing.files, test_growing.config
PROMPT = list(range(2, 40))
GREEDY = SamplingParams(max_tokens=20, seed=0, temperature=0.0, ignore_eos=True)
WORKER = b"worker"
ROUNDS = 2000


class TwoClients(Engine):
    """An engine with a client that waits for its answers, and one that only wants to learn from them."""

    def __init__(self, files: ModelFiles, setting: Setting, alignment: AdaptersConfig | None = None) -> None:
        super().__init__(files, setting, FOUR_DRAFTS if alignment else None, alignment=alignment)
        self.synthetic: list[EngineOutput] = []

    def write(self, request_id: str, prompt: list[int]) -> None:
        message = EngineRequest(
            request_id=request_id, prompt_token_ids=prompt, sampling=GREEDY, tenant="tests", is_synthetic=True
        )
        self.core.add(WORKER, message)

    def take(self, outputs: Outputs) -> None:
        self.synthetic += outputs[WORKER]
        super().take(outputs)

    def run(self) -> None:
        while self.core.patience() == 0:
            self.step()

    @property
    def ends(self) -> list[tuple[str, str | None]]:
        """Of synthetic requests, in their order."""
        return [(one.request_id, one.error_kind if one.error else None) for one in self.synthetic if one.finish_reason]


@pytest.fixture
def engine(tmp_path: Path) -> TwoClients:
    return TwoClients(make_directory(tmp_path / "model"), Setting(prefix_caching=True, num_blocks=24))


def test_whoever_comes_ends_them_within_a_step(engine: TwoClients) -> None:
    [expected] = engine.generate([PROMPT], [GREEDY])
    for name in "ab":
        engine.write(name, [7, *PROMPT])
    for _ in range(3):
        engine.step()
    assert len(engine.synthetic) == 6
    assert (engine.core.stats().num_running, engine.core.stats().waiting_by_tenant) == (0, {})

    request_id = engine.add(PROMPT, GREEDY)
    assert engine.core.stats().num_waiting == 1
    engine.write("c", PROMPT)  # nor does one begin beside it
    engine.step()
    assert engine.ends == [("a", "overloaded"), ("b", "overloaded"), ("c", "overloaded")]
    assert engine.largest_batch == 2
    engine.run()
    assert engine.output(request_id) == expected

    engine.write("d", PROMPT)
    engine.run()
    assert engine.ends[3:] == [("d", None)]
    assert [token for one in engine.synthetic if one.request_id == "d" for token in one.token_ids] == expected
    assert not engine.core.stats().blocks_used


@pytest.mark.parametrize("is_synthetic", [True, False])
def test_they_take_no_prefix_from_the_cache(engine: TwoClients, is_synthetic: bool) -> None:
    """Eight of four blocks each go through 24 blocks, of which a client's prompt has left three in the cache."""
    engine.generate([PROMPT], [GREEDY])
    for number in range(8):
        prompt = [50 + number, *PROMPT[1:]]
        if is_synthetic:
            engine.write(str(number), prompt)
            engine.run()
        else:
            engine.generate([prompt], [GREEDY])
    engine.num_cached_tokens = 0
    engine.generate([PROMPT], [GREEDY])
    assert (engine.num_cached_tokens > 0) == is_synthetic
    if is_synthetic:
        before = engine.core.stats()
        engine.write("same", PROMPT)
        engine.run()
        after = engine.core.stats()
        assert (after.prefix_hit_tokens, after.prefix_query_tokens) == (
            before.prefix_hit_tokens,
            before.prefix_query_tokens,
        )
        assert all(one.num_cached_tokens == 0 for one in engine.synthetic)


def test_all_of_them_are_logged_and_cost_others_no_record(files: ModelFiles, config: AdaptersConfig) -> None:
    engine = TwoClients(files, Setting(), config)
    [log] = [one for one in engine.core._learners if isinstance(one, VerifyLog)]
    log._budget._saved = -1.0  # a request of a client would not be logged
    engine.write("a", PROMPT)
    engine.run()
    records = read_records(config, len(engine.synthetic))
    assert all(record.is_synthetic for record in records)
    assert log._budget._saved > -1.0
    log._budget._saved = -1.0
    engine.generate([PROMPT], [GREEDY])
    assert log.stats().steps > len(records) == log.stats().records_sampled + log.stats().records_hard


class Served:
    """An engine behind its socket, stepped by hand."""

    def __init__(self, engine: Engine, address: str) -> None:
        self._core = engine.core
        self._process = EngineProcess(address, engine.core, FileCheck({}))

    def step(self) -> None:
        self._process._receive(0)
        outputs, _ = self._core.step()
        self._process._emit(outputs)

    def close(self) -> None:
        self._process._socket.close()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine.sock"


def test_an_idle_engine_goes_on_teaching(
    files: ModelFiles, config: AdaptersConfig, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten requests nobody comes any more. The draft grows all the same, and is scored on what clients asked."""
    monkeypatch.setattr(synthetic, "_MAX_TOKENS", 24)
    monkeypatch.setattr(synthetic, "_ANSWERS", 4)
    config = config.model_copy(update={"synthetic_answers": True})
    engine = Engine(files, Setting(), FOUR_DRAFTS, alignment=config)
    expected, _ = serve(engine)
    asked_for = engine.core.stats().alignment
    worker = make_worker(config, files, engine_address=address)
    worker._intake._assembler._idle_seconds = 0.1
    served = Served(engine, address)
    trained, answers = dict[int, int](), 0
    for _ in range(ROUNDS):
        worker.step()
        served.step()
        while engine.core.patience() == 0:
            served.step()
        prompts = list(worker._writer._prompts.values())
        answers = sum(prompt.num_answers for prompt in prompts)
        if aligners := list(worker._roster.aligners.values()):
            trained.setdefault(answers, aligners[0].state.num_trained_positions)
        is_written = prompts and answers == 4 * len(prompts) and not worker._writer.is_writing()
        # What was written last is learned a moment later.
        if is_written and aligners[0].state.num_trained_positions > 2 * trained[len(prompts)]:
            break
    [aligner] = worker._roster.aligners.values()
    assert answers == 4 * len(prompts), answers
    assert {prompt.tenant for prompt in prompts} == {OWNER}
    assert aligner.state.num_trained_positions > 2 * trained[len(prompts)] > 0, trained
    held_out = {segment.request_id for segment in aligner.replay.held_out}
    assert held_out
    assert not held_out & worker._writer._prompts.keys()
    assert all(name.startswith(CLIENT.hex()) for name in held_out)
    assert asked_for is not None
    assert aligner.status(None).num_synthetic_records > 0
    assert aligner.status(None).num_records == asked_for.records_hard + asked_for.records_sampled
    assert serve(engine)[0] == expected

    worker._let_go(OWNER, aligner)
    assert not worker._writer._prompts
    served.close()
    worker.close()
