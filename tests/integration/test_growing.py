"""A model without a draft grows one from its own traffic: a real engine, worker and Valkey, and a tiny random model."""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evospec.adapters.alignment import growth
from evospec.adapters.alignment.aligner import KeyAligner
from evospec.adapters.alignment.exchange import obey
from evospec.adapters.alignment.growth import DraftGrower, seed_of_draft, training_batch
from evospec.adapters.alignment.pace import Pacer
from evospec.adapters.alignment.records import Segment
from evospec.adapters.alignment.taught import TaughtDraft
from evospec.adapters.alignment.worker import AdapterWorker
from evospec.engine.adapters_config import (
    AdaptersConfig,
    GrowthConfig,
    GuardConfig,
    PaceConfig,
    ReplayConfig,
    TokenLogConfig,
    TrainingConfig,
)
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.engine.online.adapter_control import AdapterCommand
from evospec.engine.online.whole_draft import growing_fingerprint
from evospec.kernels.session_options import NUM_FEATURES
from tests.tiny_drafts import Engine, Setting
from tests.tiny_models import make_directory, soften_layers

FOUR_DRAFTS = SpeculationConfig(num_speculative_tokens=4, adaptive=False)
SAMPLING = SamplingParams(max_tokens=40, seed=0, temperature=0.0, ignore_eos=True)
OWNER, OTHER = "owner", "other"
MAX_ROUNDS = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    files = make_directory(tmp_path_factory.mktemp("model") / "fine-tune")
    soften_layers(files.path)
    return files


@pytest.fixture
def config(tmp_path: Path, valkey_url: str) -> AdaptersConfig:
    """A worker that is quick to learn and to judge."""
    training = TrainingConfig(
        learning_rate=5.5e-4, horizon=4, batch_positions=64, updates_per_version=12, updates_per_batch=16
    )
    return AdaptersConfig(
        enabled=True,
        redis_url=valkey_url,
        share_versions=False,
        shared_directory=tmp_path / "shared",
        state_directory=tmp_path / "state",
        log=TokenLogConfig(stream=f"log:{tmp_path.name}", top_k=8, interval_seconds=0.05, cost_share=1.0),
        replay=ReplayConfig(segment_positions=32, context_positions=8),
        pace=PaceConfig(step_seconds=100.0),
        growth=GrowthConfig(
            one_step_positions=500,
            checkpoint_seconds=0.0,
            training=training,
            guard=GuardConfig(min_held_out=24, min_watched=32, min_agreement=0.25, min_acceptance=0.1),
        ),
    )


def make_worker(config: AdaptersConfig, files: ModelFiles, engine_address: str = "") -> AdapterWorker:
    """One that takes the machine, whoever else wants it."""
    spec = validate_model_files(files)
    seed, fingerprint = seed_of_draft(files, spec, None), growing_fingerprint(open_weights(files), spec)
    growing = config.for_growth(seed.draft.config.recorded_size)
    pacer = Pacer(config.pace, spare_cores=lambda: 99.0)
    taught = TaughtDraft(growing, seed, fingerprint, DraftGrower)
    return AdapterWorker(taught, config.state_directory, pacer, engine_address)


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 400, (12,), generator=generator).tolist() for _ in range(10)]


def serve(engine: Engine, tenant: str = OWNER) -> tuple[list[list[int]], float]:
    """Answers to all prompts, and accepted draft tokens for each token that was not drafted."""
    accepted, prompts = engine.num_accepted, make_prompts()
    outputs = engine.generate(prompts, [SAMPLING] * len(prompts), [tenant] * len(prompts))
    accepted = engine.num_accepted - accepted
    return outputs, accepted / (sum(map(len, outputs)) - accepted)


def grow(engine: Engine, worker: AdapterWorker, expected: list[list[int]], least: float) -> list[float]:
    """Serve and train until so many drafts are accepted; the acceptance of each round."""
    rounds = list[float]()
    for number in itertools.count():
        outputs, acceptance = serve(engine)
        assert outputs == expected
        rounds.append(acceptance)
        if acceptance >= least:
            return rounds
        assert number < MAX_ROUNDS, rounds  # not by the clock: a busy machine is slow
        for _ in range(24):
            worker.step()
    raise AssertionError


def test_the_life_of_a_draft(tmp_path: Path, files: ModelFiles, config: AdaptersConfig) -> None:
    """It grows, comes into force for its owner's requests alone, and is taken back; no answer ever changes."""
    expected, _ = serve(Engine(files, Setting()))
    engine, worker = Engine(files, Setting(), FOUR_DRAFTS, alignment=config), make_worker(config, files)
    serve(engine)
    assert engine.num_drafted == 0
    while OWNER not in worker._roster.aligners:
        worker.step()
    aligner = worker._roster.aligners[OWNER]
    assert aligner.status(None).stage == "growing"
    rounds = grow(engine, worker, expected, least=0.3)
    status = aligner.status(None)
    assert rounds[0] == 0.0
    assert status.stage == "serving"
    assert status.agreement is not None
    assert status.agreement >= config.growth.guard.min_agreement

    drafted = engine.num_drafted
    assert serve(engine, OTHER)[0] == expected
    assert engine.num_drafted == drafted  # what one tenant's text has taught drafts for nobody else

    poison(aligner)
    for _ in range(MAX_ROUNDS):
        worker.step()
        if aligner.state.num_rolled_back:
            break
        assert serve(engine)[0] == expected
    assert aligner.state.num_rolled_back == 1

    obey(aligner, AdapterCommand("reset", OWNER), time.time())
    worker.step()
    drafted = engine.num_drafted
    assert serve(engine)[0] == expected
    assert engine.num_drafted == drafted
    worker.close()


def poison(aligner: KeyAligner) -> None:
    """Put weights in force that never get a token right, whatever their score was."""
    assert aligner.tensors is not None
    aligner.state.is_frozen = True
    aligner._put_in_force({name: torch.randn(old.shape).to(old.dtype) for name, old in aligner.tensors.items()})


def test_a_worker_goes_on_from_its_checkpoint(
    files: ModelFiles, config: AdaptersConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends without a word, as if killed, has lost the traffic it remembered, and none of the weights.

    A slow disk postpones no checkpoint here.
    """
    monkeypatch.setattr(growth, "_PAUSE", 0)
    engine, worker = Engine(files, Setting(), FOUR_DRAFTS, alignment=config), make_worker(config, files)
    worker._tick()
    while not worker._roster.aligners or worker._roster.aligners[OWNER].state.num_updates < 20:
        serve(engine)
        for _ in range(12):
            worker.step()
    learned = worker._roster.aligners[OWNER]._updater
    assert isinstance(learned, DraftGrower)
    worker._publisher.close()
    again = make_worker(config, files)
    while not again._roster.aligners or again._roster.aligners[OWNER]._num_unjudged == 0:
        serve(engine)
        for _ in range(12):
            again.step()
    resumed = again._roster.aligners[OWNER]._updater
    assert isinstance(resumed, DraftGrower)
    assert resumed._progress.anchors > learned._progress.anchors
    again.close()


def test_training_that_led_to_bad_weights_is_not_gone_on_with_after_a_restart(
    files: ModelFiles, config: AdaptersConfig, tmp_path: Path
) -> None:
    seed = seed_of_draft(files, validate_model_files(files), None)
    width = seed.draft.config.recorded_size
    answers = [segment(torch.arange(40), torch.randn(40, width))]

    def restarted() -> DraftGrower:
        grower = DraftGrower(seed, config.for_growth(width), "key", "of a test")
        grower.resume(tmp_path / "training")
        return grower

    bad = restarted()
    bad.update(answers)  # which keeps a checkpoint
    kept = restarted()
    kept.update(answers)
    assert kept._progress.step == 2
    bad.load(None)
    after = restarted()
    after.update(answers)
    assert after._progress.step == 1


@pytest.mark.parametrize("matrix", ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
def test_a_fine_tune_of_few_matrices_is_another_model(files: ModelFiles, tmp_path: Path, matrix: str) -> None:
    spec = validate_model_files(files)
    copied = ModelFiles(files.name, Path(shutil.copytree(files.path, tmp_path / "copy")), files.format)
    assert growing_fingerprint(open_weights(copied), spec) == growing_fingerprint(open_weights(files), spec)
    weights = load_file(copied.path / "model.safetensors")
    for name in weights:
        if matrix in name:
            weights[name] += 0.01
    save_file(weights, copied.path / "model.safetensors", metadata={"format": "pt"})
    assert growing_fingerprint(open_weights(copied), spec) != growing_fingerprint(open_weights(files), spec)


def test_a_damaged_checkpoint_is_as_if_not_there(files: ModelFiles, config: AdaptersConfig, tmp_path: Path) -> None:
    seed = seed_of_draft(files, validate_model_files(files), None)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0damaged!")
    grower = DraftGrower(seed, config.for_growth(64), "key", "of a test")
    grower.resume(tmp_path)
    hidden = seed.draft.config.recorded_size
    update = grower.update([segment(torch.arange(20), torch.randn(20, hidden))])
    assert update.num_positions == 19


def test_a_draft_grows_on_while_no_checkpoint_can_be_written(
    files: ModelFiles, config: AdaptersConfig, tmp_path: Path
) -> None:
    """What safetensors raises there, as where the disk is full, is no ``OSError``."""
    seed = seed_of_draft(files, validate_model_files(files), None)
    width = seed.draft.config.recorded_size
    grower = DraftGrower(seed, config.for_growth(width), "key", "of a test")
    grower.resume(tmp_path)
    (tmp_path / "checkpoint.partial").mkdir()
    for _ in range(2):
        grower.update([segment(torch.arange(40), torch.randn(40, width))])
    assert grower._progress.step == 2
    (tmp_path / "checkpoint.partial").rmdir()
    grower._save_at = 0.0
    grower.update([segment(torch.arange(40), torch.randn(40, width))])
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_single_tokens_teach_nothing_and_harm_nothing(files: ModelFiles, config: AdaptersConfig) -> None:
    seed = seed_of_draft(files, validate_model_files(files), None)
    width = seed.draft.config.recorded_size
    grower = DraftGrower(seed, config.for_growth(width), "key", "of a test")
    single = [segment(torch.tensor([1]), torch.randn(1, width)) for _ in range(3)]
    assert grower.update(single).num_positions == 0
    grower.update([segment(torch.arange(20), torch.randn(20, width))])
    assert all(weight.isfinite().all() for weight in grower.published().values())


def test_weights_that_were_refused_lose_no_phase_of_training(files: ModelFiles, config: AdaptersConfig) -> None:
    """What goes on from the version in force is unrolled as before, with an optimiser that warms up again."""
    seed = seed_of_draft(files, validate_model_files(files), None)
    width = seed.draft.config.recorded_size
    grower = DraftGrower(seed, config.for_growth(width), "key", "of a test")
    answers = [segment(torch.arange(40), torch.randn(40, width))]
    while grower._progress.anchors < config.growth.one_step_positions:
        grower.update(answers)
    in_force, anchors = grower.published(), grower._progress.anchors
    grower.update(answers)
    grower.load(in_force)
    grower.update(answers)
    assert grower._progress.anchors > anchors
    learner, rate = grower._learner, config.growth.training.learning_rate
    assert learner is not None
    rate *= 576 / seed.draft.config.hidden_size
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 40)
    grower.load(None)
    grower.update(answers)
    assert grower._progress.anchors == 39, "the target's last layer has learned nothing"


def test_what_a_server_has_learned_itself_goes_on_from_its_checkpoint_and_others_weights_are_unrolled(
    files: ModelFiles, config: AdaptersConfig, tmp_path: Path
) -> None:
    """A restarted server finds its own version among those that servers share, another one takes it over."""
    seed = seed_of_draft(files, validate_model_files(files), None)
    growing, answers = config.for_growth(width := seed.draft.config.recorded_size), []

    def make(directory: Path, published: dict[str, torch.Tensor] | None) -> DraftGrower:
        grower = DraftGrower(seed, growing, "key", "of a test")
        grower.load(published)
        grower.resume(directory)
        return grower

    answers = [segment(torch.arange(40), torch.randn(40, width))]
    first = make(tmp_path, None)
    for _ in range(3):
        first.update(answers)
    in_force = first.published()
    again, other = make(tmp_path, in_force), make(tmp_path / "other", None)
    again.load(in_force, is_own=True)
    other.load(in_force)
    for grower in (again, other):
        grower.update(answers)
    assert again._progress.step > 1, "the checkpoint's and one more"
    assert other._progress.step == 1
    assert other._progress.anchors == config.growth.one_step_positions + 39
    again.load(in_force, is_own=True)  # another version meanwhile: what was trained does not belong to it
    again.update(answers)
    assert again._learner is not None
    assert not again._resumes


def segment(positions: torch.Tensor, inputs: torch.Tensor) -> Segment:
    count = len(positions)
    return Segment(
        "r",
        positions,
        torch.arange(count) + 3,
        inputs.bfloat16(),
        torch.zeros(count, 8, dtype=torch.int32),
        torch.zeros(count, 8, dtype=torch.float16),
        torch.full((count,), -1, dtype=torch.int32),
        torch.ones(count, dtype=torch.bool),
        torch.zeros(count, NUM_FEATURES, dtype=torch.float16),
    )


def test_labels_are_in_the_row_of_the_next_position_and_chains_end_at_holes() -> None:
    positions = torch.tensor([4, 5, 6, 9, 10])
    rows = positions[:, None].float().expand(-1, 6)  # the last two columns are of the position before, as the others
    batch = training_batch([segment(positions, rows), segment(positions[:2], rows[:2])], num_steps=3, fused_size=4)
    length = batch.length
    assert batch.starts.tolist() == [0, 1, 3, length]  # 6 and the last of each have no next position
    assert batch.lengths.tolist() == [2, 1, 1, 1]
    assert batch.features.shape == (2, length, 4)
    for start in batch.starts.tolist():
        row, column = divmod(start, length)
        assert batch.labels[row, column].tolist() == [batch.positions[row, column] + 1] * 2
