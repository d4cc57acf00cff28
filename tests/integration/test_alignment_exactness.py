"""Weights that come and go in mid-generation never change an output, and what the engine logs of it is true.

float32 engines on a tiny random model; adapters (or whole drafts) are random, large, and change every few
steps.
"""

from __future__ import annotations

import itertools
import random
import shutil
import uuid
from array import array
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from evospec.engine.adapters_config import AdaptersConfig
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint, lora_layout
from evospec.engine.online import adapters as eagle_adapters
from evospec.engine.online import run_writer, verify_log, verify_record
from evospec.engine.online.adapter_control import adapter_key
from evospec.engine.online.feature_ring import FeatureRingReader
from evospec.engine.online.token_log import TokenLog
from evospec.engine.online.verify_record import VerifyRecord
from evospec.engine.online.weight_channel import WeightWriter
from evospec.engine.online.whole_draft import whole_layout
from evospec.engine.request import Request
from evospec.engine.speculation.length.cost_meter import CostMeter
from evospec.engine.speculation.length.costs import Curve, StepCosts
from evospec.engine.speculation.speculator import Speculator
from evospec.engine.step import Proposals, ScheduledSequence
from evospec.kernels import native
from tests.alignment import exchange_whole_drafts, make_alignment, make_prompts, read_records
from tests.combinations import pairwise
from tests.exactness import NUM_TOKENS, SETTINGS, make_sampling
from tests.tiny_drafts import CLIENT, Engine, make_draft_directory
from tests.tiny_models import make_directory

TENANTS = ["law", "clinic", "code"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target")


@pytest.fixture(scope="module")
def draft(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft_directory(tmp_path_factory.mktemp("draft") / "eagle", files)


@pytest.fixture
def alignment(tmp_path: Path, valkey_url: str) -> AdaptersConfig:
    """Of adapters."""
    return make_alignment(tmp_path, valkey_url, "lora")


@pytest.fixture(params=["lora", "whole"])
def either(
    tmp_path: Path, valkey_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AdaptersConfig:
    """Of adapters, or of whole drafts."""
    if request.param == "whole":
        exchange_whole_drafts(monkeypatch)
    return make_alignment(tmp_path, valkey_url, request.param)


class Publisher:
    """A worker that publishes noise."""

    def __init__(self, config: AdaptersConfig, draft: Path, seed: int) -> None:
        eagle = load_draft(draft, torch.float32, CPU)
        base = draft_fingerprint(draft)
        self._layout = lora_layout(eagle.config, config.rank, config.targets, base)
        if config.key_scope == "global":
            self._layout = whole_layout(eagle.config, base)
        self._keys = {adapter_key(config.key_scope, tenant, None) for tenant in TENANTS}
        self._writer = WeightWriter(config.channel_path, self._layout)
        self._chance = random.Random(seed)
        self.published: dict[int, str] = {}
        """Key of each version."""

    def act(self) -> None:
        slot = self._chance.randrange(len(self._writer.slots))
        held = {state.key for index, state in enumerate(self._writer.slots) if index != slot}
        free = sorted(self._keys - held)
        if self._chance.random() < 0.2 or not free:
            self._writer.clear(slot)
            return
        key = self._chance.choice(free)
        tensors = {spec.name: torch.randn(spec.shape).to(spec.dtype) for spec in self._layout.tensors}
        self.published[self._writer.publish(slot, key, tensors)] = key


def make_engine(files: ModelFiles, draft: Path, setting: str, alignment: AdaptersConfig | None) -> Engine:
    speculation = SpeculationConfig(
        method="eagle3", draft=str(draft), adaptive=False, num_speculative_tokens=4, vocabulary="dynamic:full+0"
    )
    return Engine(files, SETTINGS[setting], speculation if alignment else None, alignment=alignment)


@pytest.fixture(scope="module")
def expected(files: ModelFiles, draft: Path) -> dict[str, list[list[int]]]:
    """Outputs without drafts."""
    engine, prompts = make_engine(files, draft, "alone", None), make_prompts()
    return {kind: engine.generate_alone(prompts, make_sampling(kind, len(prompts))) for kind in ("greedy", "sampled")}


@pairwise(either=["lora", "whole"], setting=SETTINGS, kind=["greedy", "sampled"], indirect=["either"])
def test_outputs_do_not_depend_on_weights(
    files: ModelFiles,
    draft: Path,
    either: AdaptersConfig,
    expected: dict[str, list[list[int]]],
    setting: str,
    kind: str,
) -> None:
    prompts = make_prompts()
    sampling = make_sampling(kind, len(prompts))
    engine = make_engine(files, draft, setting, either)
    publisher = Publisher(either, draft, seed=len(setting))
    tenants = [TENANTS[index % 3] for index in range(len(prompts))]
    ids = [engine.add(*one) for one in zip(prompts, sampling, tenants, strict=True)]
    steps = 0
    while engine.is_busy:
        engine.step()
        steps += 1
        if steps % 3 == 0:
            publisher.act()
    assert [engine.output(request_id) for request_id in ids] == expected[kind]
    stats = engine.core.stats().alignment
    assert stats is not None
    assert stats.steps == stats.records_sampled > 0
    records = read_records(either, stats.steps)
    for record in records:
        assert record.adapter_key == publisher.published.get(record.draft_version)
        assert record.adapter_key in (None, adapter_key(either.key_scope, record.tenant, None))
    assert len({record.draft_version for record in records}) > 5
    assert stats.loads >= 5
    assert stats.failed_loads == 0


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
def test_compiled_kernels_alone(tmp_path: Path, either: AdaptersConfig) -> None:
    """In bf16 too, to the bit, one request at a time; and the weights do change what is drafted."""
    files = make_directory(tmp_path / "target", hidden_size=128, head_dim=32)
    draft = make_draft_directory(tmp_path / "draft", files)
    prompts = make_prompts()
    sampling = make_sampling("greedy", len(prompts))
    plain = Engine(files, SETTINGS["alone"], dtype="auto").generate_alone(prompts, sampling)
    drafted = []
    for publishes in (False, True):
        log = either.log.model_copy(update={"stream": f"log-{uuid.uuid4()}", "control_share": 0.0})
        config = either.model_copy(update={"shared_directory": tmp_path / str(publishes), "log": log})
        speculation = SpeculationConfig(method="eagle3", draft=str(draft), adaptive=False)
        engine = Engine(files, SETTINGS["alone"], speculation, dtype="auto", alignment=config)
        publisher = Publisher(config, draft, seed=1)
        for prompt, params, expected in zip(prompts, sampling, plain, strict=True):
            if publishes:
                publisher.act()
            assert engine.generate([prompt], [params], [TENANTS[len(prompt) % 3]]) == [expected]
        stats = engine.core.stats().alignment
        assert stats is not None
        drafted.append([record.drafted for record in read_records(config, stats.steps)])
    assert drafted[0] != drafted[1]


@pytest.mark.parametrize(
    ("setting", "ring_rows"), [("batch", 16384), ("batch", 900), ("preemption", 16384)], ids=lambda value: str(value)
)
def test_records_say_what_happened(
    files: ModelFiles, draft: Path, either: AdaptersConfig, setting: str, ring_rows: int
) -> None:
    """Also where the prompts of a step fill more of the ring than is written at once, and where blocks are lost."""
    either = either.model_copy(update={"log": either.log.model_copy(update={"ring_rows": ring_rows})})
    prompts = make_prompts()
    stop = make_engine(files, draft, "alone", None).generate_alone(prompts[:1], make_sampling("greedy", 1))[0][20]
    engine = make_engine(files, draft, setting, either)
    sampling = make_sampling("greedy", len(prompts))
    sampling[0] = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, stop_token_ids=(stop,))
    sessions = [SessionState(domain="contracts") for _ in prompts]
    outputs = engine.generate(prompts, sampling, ["law"] * len(prompts), sessions)
    stats = engine.core.stats().alignment
    assert stats is not None
    by_request = defaultdict(list)
    for record in read_records(either, stats.steps):
        by_request[record.request_id.partition("/")[2]].append(record)
    ring = FeatureRingReader(either.ring_path)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for request_id, records in by_request.items():
        tokens = prompts[int(request_id)] + outputs[int(request_id)]
        for record in records:
            begin = record.position
            accepted = list(record.drafted[: record.num_accepted])
            assert [record.last_token, *accepted, record.next_token] == tokens[begin - 1 : begin + len(accepted) + 1]
            if record.num_accepted < len(record.drafted):
                assert record.drafted[record.num_accepted] != record.next_token
            ids, logits = record.top_k_arrays()
            assert ids[:, 0].tolist() == tokens[begin : begin + len(ids)]  # greedy: the most likely ones
            assert (np.diff(logits) <= 0).all()
            assert (record.tenant, record.domain, record.is_hard_example) == ("law", "contracts", False)
            assert len(ids) == record.num_features == record.num_accepted + 1
            first = check_context(record, tokens)
            slots = torch.arange(record.num_context + record.num_features) + record.feature_slot - record.num_context
            rows, valid = ring.read(slots, torch.full_like(slots, record.feature_generation))
            assert valid.all()
            for place, row in enumerate(rows):
                seen[request_id, first + place] = row
        context = [record.num_context for record in records]
        assert context[0] == min(len(prompts[int(request_id)]) - 1, either.log.context_tokens)
        assert not any(context[1:])
    assert sum(len(records) for records in by_request.values()) == stats.steps
    check_features(engine, draft, prompts[0] + outputs[0], {p: row for (r, p), row in seen.items() if r == "0"})
    check_features(engine, draft, prompts[1] + outputs[1], {p: row for (r, p), row in seen.items() if r == "1"})


def test_steps_of_a_request_that_is_aborted_are_written(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig
) -> None:
    """Their features are still in the blocks that it gives back."""
    engine, prompt = make_engine(files, draft, "alone", alignment), make_prompts()[0]
    request_id = engine.add(prompt, make_sampling("greedy", 1)[0])
    for _ in range(6):
        engine.step()
    engine.core.abort(CLIENT, [request_id])
    tokens, rows = prompt + engine.output(request_id), dict[int, torch.Tensor]()
    ring = FeatureRingReader(alignment.ring_path)
    for record in read_records(alignment, 6):
        first = check_context(record, tokens)
        slots = torch.arange(record.num_context + record.num_features) + record.feature_slot - record.num_context
        found, valid = ring.read(slots, torch.full_like(slots, record.feature_generation))
        assert valid.all()
        rows |= {first + place: row for place, row in enumerate(found)}
    assert sorted(rows) == list(range(len(tokens) - 1))
    check_features(engine, draft, tokens, rows)


def test_nothing_is_logged_of_requests_that_refuse(files: ModelFiles, draft: Path, alignment: AdaptersConfig) -> None:
    """Not even of those that keep the base draft, all of which are logged otherwise."""
    log = alignment.log.model_copy(update={"control_share": 0.5})
    engine = make_engine(files, draft, "batch", alignment.model_copy(update={"log": log}))
    prompts = [*make_prompts(), *make_prompts()]
    asked = enumerate(zip(prompts, make_sampling("greedy", len(prompts)), strict=True))
    ids = [engine.add(prompt, sampling, learn=number % 2 == 0) for number, (prompt, sampling) in asked]
    while engine.is_busy:
        engine.step()
    stats = engine.core.stats().alignment
    assert stats is not None
    records = read_records(alignment, stats.records_sampled)
    assert {record.request_id.partition("/")[2] for record in records} == set(ids[::2])


def test_context_comes_again_after_silence(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the worker has given the request up."""
    monkeypatch.setattr(verify_record, "_STEPS_AT_ONCE", 1)
    engine, prompt = make_engine(files, draft, "alone", alignment), make_prompts()[0]
    engine.add(prompt, make_sampling("greedy", 1)[0])
    for seconds, num_steps in ((3.0, 6), (0.0, 2), (3.0, NUM_TOKENS)):
        monkeypatch.setattr(run_writer, "_CONTEXT_SECONDS", seconds)
        for _ in range(num_steps):
            engine.step()
    stats = engine.core.stats().alignment
    assert stats is not None
    records, tokens = read_records(alignment, stats.steps), prompt + engine.output("0")
    first, *others = [record.num_context > 0 for record in records]
    assert first
    assert sum(others) == 2
    assert not others[0]
    assert not others[-1]
    for record in records:
        check_context(record, tokens)


def test_context_comes_again_after_a_record_was_lost(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been the one with the context."""
    monkeypatch.setattr(verify_record, "_STEPS_AT_ONCE", 1)
    monkeypatch.setattr(run_writer, "_LOOK_SECONDS", 0.0)
    engine, prompt = make_engine(files, draft, "alone", alignment), make_prompts()[0]
    engine.add(prompt, make_sampling("greedy", 1)[0])
    written = TokenLog.log
    lost: list[VerifyRecord] = []

    def lose_one(self: TokenLog, record: VerifyRecord) -> None:
        if lost:
            written(self, record)
        else:
            lost.append(record)
            self.stats.num_dropped_by_queue += 1

    monkeypatch.setattr(TokenLog, "log", lose_one)
    while engine.is_busy:
        engine.step()
    stats = engine.core.stats().alignment
    assert stats is not None
    records = read_records(alignment, stats.steps - 1)
    assert lost[0].num_context
    assert [record.num_context > 0 for record in records] == [True] + [False] * (len(records) - 1)


def check_context(record: VerifyRecord, tokens: list[int]) -> int:
    """It is what stands before the record's own tokens; the place where it begins."""
    last = record.position - 1
    first = last - record.num_context
    assert record.context_ids().tolist() == tokens[first:last]
    return first


def check_features(engine: Engine, draft: Path, tokens: list[int], rows: dict[int, torch.Tensor]) -> None:
    """Rows by the position of the token that the draft takes them with."""
    eagle = load_draft(draft, torch.float32, CPU)
    features = target_features(engine, tokens, eagle.config.capture_layers)
    expected = torch.cat((torch.zeros(1, features.shape[1]), features))
    if len(next(iter(rows.values()))) == eagle.config.hidden_size:
        expected = eagle.fuse(expected)
    assert len(rows) > 4
    for position, row in rows.items():
        torch.testing.assert_close(row.float(), expected[position], rtol=1e-2, atol=1e-3)


def target_features(engine: Engine, tokens: list[int], layers: tuple[int, ...]) -> torch.Tensor:
    """Of the model alone, over all tokens at once."""
    request = Request("alone", b"", "", make_sampling("greedy", 1)[0], tokens)
    blocks = array("i", range(-(-len(tokens) // 16)))
    _, features = engine.core._runner.execute([ScheduledSequence(request, 0, tokens, 0, 0, 1, blocks)], layers)
    assert features is not None
    return features.values.clone()


def test_records_of_copies_are_marked(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a draft costs too much and a copy nothing, all drafts are copies; those nobody looked at say nothing."""
    dear = Curve([(1, 100.0)])
    monkeypatch.setattr(CostMeter, "measure", lambda _: StepCosts(Curve([(1, 1.0)]), first_draft=dear, next_draft=dear))
    speculation = SpeculationConfig(method="eagle3", draft=str(draft), vocabulary="dynamic:full+0")
    dropped = cut_all_each_second(monkeypatch)
    engine = Engine(files, SETTINGS["batch"], speculation, alignment=alignment)
    few = dict.fromkeys((10, 11, 12), 50.0)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True, logit_bias=few)
    engine.generate(make_prompts(), [sampling] * len(make_prompts()))
    stats = engine.core.stats().alignment
    assert stats is not None
    records = read_records(alignment, stats.steps)
    assert dropped
    assert any(record.drafted for record in records)
    assert all(record.copied == bool(record.drafted) for record in records)
    assert not any(record.drafted for record in records if (record.request_id, record.position) in dropped)
    assert all(record.first_right is None for record in records)


def cut_all_each_second(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], int]:
    """Nothing of each second step's drafts is verified; the first token of each such draft, by request and position."""
    turns = itertools.count()
    cut = Speculator._cut
    firsts: dict[tuple[str, int], int] = {}

    def cut_or_drop(self: Speculator, proposals: Proposals) -> None:
        cut(self, proposals)
        if next(turns) % 2:
            for request, proposal in proposals.items():
                firsts[request.request_id, len(request.all_token_ids)] = proposal.token_ids[0]
                proposal.token_ids = []  # another list: that of all drafts is kept

    monkeypatch.setattr(Speculator, "_cut", cut_or_drop)
    return firsts


def test_steps_without_drafts_leave_no_holes(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each second step no draft is worth verifying; all tokens are logged all the same."""
    firsts = cut_all_each_second(monkeypatch)
    engine, prompts = make_engine(files, draft, "alone", alignment), make_prompts()
    outputs = engine.generate(prompts, make_sampling("greedy", len(prompts)))
    stats = engine.core.stats().alignment
    assert stats is not None
    ends: dict[str, int] = {}
    records = read_records(alignment, stats.steps)
    for record in records:
        end = ends.get(record.request_id, record.position)
        assert record.position == end
        ends[record.request_id] = end + record.num_accepted + 1
        assert record.num_features == record.num_accepted + 1
    left = [len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True)]
    for name, end in ends.items():
        left[int(name.partition("/")[2])] -= end
    assert set(left) == {0}
    without = [record for record in records if not record.drafted]
    assert len(without) > len(prompts)
    for record in records:
        first = record.drafted[0] if record.drafted else firsts.get((record.request_id, record.position))
        chosen = record.drafted[0] if record.num_accepted else record.next_token
        assert record.first_right == (None if first is None else first == chosen)


def test_the_gate_keeps_what_teaches(files: ModelFiles, draft: Path, alignment: AdaptersConfig) -> None:
    log = alignment.log.model_copy(update={"sample_share": 1e-9, "control_share": 0.0, "kl_threshold": 1e9})
    alignment = alignment.model_copy(update={"log": log})
    engine = make_engine(files, draft, "batch", alignment)
    prompts = make_prompts()
    engine.generate(prompts, make_sampling("greedy", len(prompts)))
    stats = engine.core.stats().alignment
    assert stats is not None
    assert stats.records_sampled == 0
    records = read_records(alignment, stats.records_hard)
    assert all(record.num_accepted < len(record.drafted) or not record.drafted for record in records)
    assert all(record.is_hard_example for record in records)


def test_what_has_no_time_to_be_logged_is_left_out_by_requests(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls alone are logged then, whole."""
    monkeypatch.setattr(verify_log, "_SAVED_SECONDS", 0.0)
    log = alignment.log.model_copy(update={"cost_share": 0.0, "control_share": 0.4})
    alignment = alignment.model_copy(update={"log": log})
    engine, prompts = make_engine(files, draft, "batch", alignment), make_prompts()
    outputs = engine.generate(prompts, make_sampling("greedy", len(prompts)))
    stats = engine.core.stats().alignment
    assert stats is not None
    records = read_records(alignment, stats.records_sampled)
    assert 0 < len(records) < stats.steps
    counts: dict[str, int] = {}
    for record in records:
        assert record.adapter_key is None
        counts[record.request_id] = counts.get(record.request_id, 0) + record.num_accepted + 1
    for name, count in counts.items():
        assert count >= len(outputs[int(name.partition("/")[2])]) - 2


def test_nothing_waits_for_a_redis_that_is_not_there(files: ModelFiles, draft: Path, alignment: AdaptersConfig) -> None:
    url = f"unix://{alignment.shared_directory / 'nobody.sock'}"
    engine = make_engine(files, draft, "batch", alignment.model_copy(update={"redis_url": url}))
    prompts = make_prompts()
    expected = make_engine(files, draft, "batch", None).generate(prompts, make_sampling("greedy", len(prompts)))
    assert engine.generate(prompts, make_sampling("greedy", len(prompts))) == expected
    stats = engine.core.stats().alignment
    assert stats is not None
    assert stats.records_written == 0


def test_shared_memory_that_was_deleted_comes_back(
    files: ModelFiles, draft: Path, alignment: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts afterwards finds channel and ring, and in the ring what is logged from then on."""
    monkeypatch.setattr(run_writer, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
    alignment = alignment.model_copy(update={"shared_directory": alignment.shared_directory / "shared"})
    engine, prompts = make_engine(files, draft, "batch", alignment), make_prompts()
    engine.generate(prompts, make_sampling("greedy", len(prompts)))
    shutil.rmtree(alignment.shared_directory)
    engine.generate(prompts, make_sampling("greedy", len(prompts)))
    Publisher(alignment, draft, seed=0).act()
    stats = engine.core.stats().alignment
    assert stats is not None
    last = read_records(alignment, stats.records_sampled + stats.records_hard)[-1]
    reader = FeatureRingReader(alignment.ring_path)
    slots = torch.arange(last.feature_slot, last.feature_slot + last.num_features)
    _, valid = reader.read(slots, torch.full_like(slots, last.feature_generation))
    assert valid.all()
