"""A draft whose numbers are none, or infinite: answers are the target's all the same, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.eagle3 import save_draft
from evospec.engine.speculation.drafters.head import COUNTS_FILE
from evospec.engine.speculation.length.policy import LengthPolicy
from evospec.engine.speculation.speculator import Speculator
from tests.combinations import pairwise
from tests.tiny_drafts import Engine, Setting, random_draft
from tests.tiny_models import VOCAB_SIZE, make_directory

PROMPTS = [[3 + number, 5, 7, 9, 11] * 8 for number in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("target") / "target", hidden_size=128, head_dim=32)


def broken_draft(files: ModelFiles, directory: Path, how: str) -> Path:
    draft = random_draft(files)
    if how == "no numbers":
        draft.o_proj.weight.fill_(float("nan"))
    else:  # some logits are infinite, others are not
        draft.output_norm.fill_(1e38 if how == "infinite" else 1e37)
    save_draft(draft, directory)
    save_file({"counts": torch.arange(VOCAB_SIZE)}, directory / COUNTS_FILE)
    return directory


@pairwise(
    dtype=["float32", "auto"],
    how=["no numbers", "infinite", "nearly infinite"],
    vocabulary=["dynamic:20+32", "dynamic:100+32", "static:40"],
    temperature=[0.0, 0.8],
)
def test_answers_are_the_targets(
    files: ModelFiles, tmp_path: Path, dtype: Literal["float32", "auto"], how: str, vocabulary: str, temperature: float
) -> None:
    """A core of fewer tokens than candidates leaves empty places, which must never be drafted."""
    draft = broken_draft(files, tmp_path / "draft", how)
    speculation = SpeculationConfig(
        method="eagle3", draft=str(draft), vocabulary=vocabulary, adaptive=False, num_speculative_tokens=3
    )
    sampling = [SamplingParams(max_tokens=16, seed=n, temperature=temperature, ignore_eos=True) for n in range(3)]
    plain, drafted = (Engine(files, Setting(), each, dtype=dtype) for each in (None, speculation))
    assert drafted.generate(PROMPTS, sampling) == plain.generate(PROMPTS, sampling)
    assert isinstance(drafted.core._drafter, Speculator)
    vocab = drafted.core._drafter._vocab
    if vocab is not None:
        memory = vocab._past._memory
        assert memory is not None
        assert np.isfinite(memory.weights("tests", None) or [0.0]).all()


def test_what_drafts_took_is_told_once_a_draft(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that only compute a prompt have no drafts, also right after a request that ended amid them."""
    told: list[float] = []
    monkeypatch.setattr(LengthPolicy, "record_seconds", lambda _, seconds: told.append(seconds))
    draft = broken_draft(files, tmp_path / "draft", "no numbers")
    speculation = SpeculationConfig(
        method="eagle3", draft=str(draft), vocabulary="static:40", adaptive=False, num_speculative_tokens=3
    )
    engine = Engine(files, Setting(max_batched_tokens=16), speculation)
    steps_with_drafts = 0
    for prompt in PROMPTS:
        request_id = engine.add(prompt, SamplingParams(max_tokens=50, seed=0, temperature=0.0, ignore_eos=True))
        for _ in range(8):
            before = engine.num_drafted
            engine.step()
            steps_with_drafts += engine.num_drafted > before
        engine.abort(request_id)
    assert len(told) == steps_with_drafts > 0
