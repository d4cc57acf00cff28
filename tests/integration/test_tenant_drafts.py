"""A tenant's drafts do not show what other tenants were served."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from evospec.engine.config import DynamicConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams, SessionState
from evospec.engine.models.config import ModelFiles
from evospec.engine.speculation.length.cost_meter import CostMeter
from evospec.engine.speculation.length.costs import Curve, StepCosts
from evospec.kernels import native
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import make_directory

COSTS = StepCosts(verify=Curve([(1, 10.0), (64, 16.3)]), first_draft=Curve([(1, 0.1)]), next_draft=Curve([(1, 0.1)]))
"""Seconds: drafts of a tiny model never take longer, so that no clock decides."""
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 30, 31]
GREEDY = SamplingParams(max_tokens=40, seed=0, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("model"), hidden_size=128, head_dim=32)


def lengths(engine: Engine, tenant: str) -> list[int]:
    """Draft tokens of each step of the fixed prompt."""
    engine.add(PROMPT, GREEDY, tenant, SessionState(domain="d"))
    of_steps = []
    while engine.is_busy:
        before = engine.num_drafted
        engine.step()
        of_steps.append(engine.num_drafted - before)
    return of_steps


def serve_random(engine: Engine, tenant: str) -> None:
    """Random tokens, greedy and sampled ones, in batches and one by one."""
    chance = np.random.default_rng(3)
    prompts = chance.integers(4, 500, (12, 20)).tolist()
    sampling = [SamplingParams(max_tokens=40, seed=n, temperature=float(n % 2), ignore_eos=True) for n in range(12)]
    engine.generate(prompts[:8], sampling[:8], tenants=[tenant] * 8)
    for prompt, params in zip(prompts[8:], sampling[8:], strict=True):
        engine.generate([prompt], [params], tenants=[tenant])


@pytest.mark.parametrize("vocabulary", ["full", "dynamic:96+32"])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_lengths_of_a_fixed_prompt_do_not_show_what_others_were_served(
    files: ModelFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Literal["float32", "auto"],
    vocabulary: str,
) -> None:
    """With chains that end by themselves, and with those drafted token by token."""
    if dtype == "auto" and native.unsupported_reason() is not None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(CostMeter, "measure", lambda meter: COSTS)
    draft = str(make_draft_directory(tmp_path, files))
    speculation = SpeculationConfig(
        method="eagle3", draft=draft, vocabulary=vocabulary, dynamic=DynamicConfig(max_sessions=3)
    )
    alone, among_others = (Engine(files, Setting(), speculation, dtype=dtype) for _ in range(2))
    assert lengths(alone, "a") == lengths(among_others, "a")
    serve_random(among_others, "b")
    expected = lengths(alone, "a")
    assert any(expected)
    assert lengths(among_others, "a") == expected
    assert lengths(among_others, "b") != expected  # it has learned from its own
