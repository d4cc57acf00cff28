"""Vocabularies and token log want the target's most likely tokens of the same positions: they are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from evospec.engine import step
from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams, SessionState, VocabularyCounts
from evospec.kernels.session_options import FEATURES
from evospec.kernels.topk import topk_rows_on_host
from tests.alignment import make_alignment, make_prompts, read_records
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import make_directory


@pytest.mark.parametrize("log_top_k", [4, 16], ids=["fewer", "more"])
def test_the_log_computes_for_both(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch, log_top_k: int
) -> None:
    """Vocabularies, which look at ten, are the same with and without a log, and a step computes no row twice."""
    files = make_directory(tmp_path / "target")
    draft = make_draft_directory(tmp_path / "draft", files)
    speculation = SpeculationConfig(method="eagle3", draft=str(draft), adaptive=False, vocabulary="dynamic:64+32")
    alignment = make_alignment(tmp_path / "shared", valkey_url, "lora")
    alignment = alignment.model_copy(update={"log": alignment.log.model_copy(update={"top_k": log_top_k})})
    prompts = make_prompts()
    sampling = [SamplingParams(max_tokens=24, seed=n, ignore_eos=True) for n in range(len(prompts))]
    looked_at: list[torch.Tensor] = []

    def recording(logits: torch.Tensor, *arguments: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        looked_at.append(logits)  # kept, so that no other has its id
        return topk_rows_on_host(logits, *arguments)

    monkeypatch.setattr(step, "topk_rows_on_host", recording)

    def serve(engine: Engine) -> tuple[list[list[int]], dict[str, bytes], dict[str, VocabularyCounts]]:
        looked_at.clear()
        outputs = engine.generate(prompts, sampling, sessions=[SessionState()] * len(prompts))
        return outputs, engine.snapshots, engine.counts

    expected = serve(Engine(files, Setting(), speculation))
    assert len(looked_at) > 10
    engine = Engine(files, Setting(), speculation, alignment=alignment)
    assert serve(engine) == expected
    assert len({id(logits) for logits in looked_at}) == len(looked_at)
    stats = engine.core.stats().alignment
    assert stats is not None
    records = read_records(alignment, stats.steps)
    assert {record.top_k for record in records} == {log_top_k}
    weights = [record.prior_weights() for record in records if record.prior]
    assert any(of_record[FEATURES.index("bigram")] > 0 for of_record in weights)
