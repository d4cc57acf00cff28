"""Drafts exchanged as a whole while they serve (full-parameter distillation), and adapters beside them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.distillation.full_parameters import FullParameterUpdater
from evospec.adapters.alignment.pace import Pacer
from evospec.adapters.alignment.taught import TaughtDraft
from evospec.adapters.alignment.worker import AdapterWorker
from evospec.engine.adapters_config import AdaptersConfig, GuardConfig, PaceConfig, ReplayConfig, TrainingConfig
from evospec.engine.config import ModelConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.eagle3 import load_draft
from evospec.engine.models.lora import draft_fingerprint, lora_layout
from evospec.engine.models.registry import resolve_model
from evospec.engine.online.weight_channel import WeightWriter
from evospec.engine.online.whole_draft import whole_layout
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.text.tokenizer import Tokenizer
from evospec.kernels import native
from tests.alignment import exchange_whole_drafts, make_alignment
from tests.drifting_traffic import TinyDraft
from tests.tiny_drafts import Engine, Setting

TEXTS = [
    "The licensee shall not, without the prior written consent of the licensor,",
    "def mean(values):\n    ",
    "The most common causes of chest pain are",
    "The capital of France is Paris. The capital of Spain is Madrid. The capital of Italy is",
]
CPU = torch.device("cpu")
FOUR_DRAFTS = SpeculationConfig(method="eagle3", num_speculative_tokens=4, adaptive=False)
MAX_ROUNDS = 300


@dataclass
class Served:
    """Outputs of some prompts, and the share of draft tokens that were accepted."""

    outputs: list[list[int]]
    acceptance: float


def serve(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> Served:
    """All prompts at once, as far as the engine takes them."""
    drafted, accepted = engine.num_drafted, engine.num_accepted
    outputs = engine.generate(prompts, [sampling] * len(prompts))
    return Served(outputs, (engine.num_accepted - accepted) / (engine.num_drafted - drafted))


@pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))
@pytest.mark.parametrize("method", ["whole", "lora"])
def test_swap(
    tmp_path: Path, valkey_url: str, smollm2_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 and its draft: bad weights cost acceptance and no output; the base's give all of it back."""
    if method == "whole":
        exchange_whole_drafts(monkeypatch)
    files = resolve_model(ModelConfig())
    config = make_alignment(tmp_path, valkey_url, method)
    config = config.model_copy(update={"log": config.log.model_copy(update={"control_share": 0.0})})
    # A vocabulary that does not learn from one answer to the next.
    speculation = FOUR_DRAFTS.model_copy(update={"vocabulary": "static:4096"})
    engine = Engine(files, Setting(max_num_seqs=1), speculation, dtype="auto", alignment=config)
    directory = DRAFTS / files.name
    draft = load_draft(directory, torch.bfloat16, CPU)
    base = draft_fingerprint(directory)
    if method == "whole":
        key, layout = "*", whole_layout(draft.config, base)
        same = {name: weight.clone() for name, weight in draft.named_parameters()}
        bad = {name: torch.zeros_like(weight) for name, weight in same.items()}
    else:
        key, layout = "tests", lora_layout(draft.config, config.rank, config.targets, base)
        same = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in layout.tensors}
        bad = {name: torch.randn(weight.shape).to(weight.dtype) for name, weight in same.items()}
    writer = WeightWriter(config.channel_path, layout)
    tokenizer = Tokenizer.from_files(files)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    greedy = SamplingParams(max_tokens=32, seed=0, temperature=0.0, ignore_eos=True)

    normal = serve(engine, prompts, greedy)
    writer.publish(0, key, bad)
    broken = serve(engine, prompts, greedy)
    writer.publish(0, key, same)
    restored = serve(engine, prompts, greedy)
    writer.publish(0, key, bad)
    assert serve(engine, prompts, greedy).acceptance == broken.acceptance
    writer.clear(0)
    returned = serve(engine, prompts, greedy)

    assert broken.outputs == restored.outputs == returned.outputs == normal.outputs
    assert normal.acceptance > 0.15
    assert broken.acceptance < 0.5 * normal.acceptance
    assert abs(restored.acceptance - normal.acceptance) < 0.02
    assert returned.acceptance == normal.acceptance


def eager_config(directory: Path, url: str) -> AdaptersConfig:
    """A worker that is quick to learn and to judge."""
    return make_alignment(directory / "shared", url, "whole").model_copy(
        update={
            "state_directory": directory / "state",
            "training": TrainingConfig(
                learning_rate=0.3, batch_positions=64, updates_per_version=8, updates_per_batch=12
            ),
            "replay": ReplayConfig(segment_positions=32, context_positions=8),
            "guard": GuardConfig(min_held_out=24, min_watched=32, watched_records=128),
            "pace": PaceConfig(step_seconds=10.0),
        }
    )


def test_a_worker_distils_the_whole_draft_of_a_serving_engine(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the engine's log and its unfused features; outputs stay, acceptance rises, and a reset takes it back."""
    exchange_whole_drafts(monkeypatch)
    tiny = TinyDraft.make(tmp_path)
    config = eager_config(tmp_path, valkey_url)
    files = ModelFiles(tiny.model.name, tiny.model, "safetensors")
    speculation = FOUR_DRAFTS.model_copy(update={"draft": str(tiny.directory)})
    engine = Engine(files, Setting(max_num_seqs=8), speculation, alignment=config)
    pacer = Pacer(config.pace, spare_cores=lambda: 99.0)
    worker = AdapterWorker(
        TaughtDraft(config, tiny.drafter, tiny.base, FullParameterUpdater), config.state_directory, pacer
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (12,), generator=generator).tolist() for _ in range(8)]
    sampling = SamplingParams(max_tokens=48, seed=0, temperature=0.0, ignore_eos=True)
    before = serve(engine, prompts, sampling)
    served = before
    for rounds in itertools.count():  # not by the clock: a busy machine is slow
        if served.acceptance >= before.acceptance + 0.2:
            break
        assert rounds < MAX_ROUNDS, f"acceptance {served.acceptance}, at first {before.acceptance}"
        served = serve(engine, prompts, sampling)
        assert served.outputs == before.outputs
        for _ in range(24):
            worker.step()
    stats = engine.core.stats().alignment
    assert stats is not None
    assert stats.versions.keys() == {"*"}
    assert stats.failed_loads == 0
    worker.close()
