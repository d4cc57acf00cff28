"""Chains of drafts in one call are the chains that token by token gives, and leave behind the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engine.config import DynamicConfig, SpeculationConfig
from engine.messages import SamplingParams
from engine.models.config import ModelFiles
from engine.spec.draft_head import DraftHead
from engine.spec.eagle import EagleProposer
from engine.step_plan import DraftSlot
from kernels import native
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import make_directory

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason="no compiled kernels")

VOCABULARIES = ["full", "static:96", "dynamic:96+32", "dynamic:full+0"]
NUM_TOKENS = 24
SETTING = Setting(max_num_seqs=4, num_blocks=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_directory(tmp_path_factory.mktemp("model"), hidden_size=128, head_dim=32)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """More than fit in a batch; greedy ones and others, chains of all lengths, texts that repeat themselves."""
    rng = np.random.default_rng(1)
    prompts = [[*piece, *piece, *piece[:3]] for piece in rng.integers(4, 500, (8, 7)).tolist()]
    ways: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.1},
    ]
    return prompts, [
        SamplingParams(max_tokens=NUM_TOKENS, seed=-n, num_speculative_tokens=1 + n % 5, **ways[n % 4])  # type: ignore[arg-type]
        for n in range(len(prompts))
    ]


class DraftsTaken:
    """All drafts of an engine: by request and the number of tokens before them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, greedy: bool) -> None:
        self.drafts: dict[tuple[str, int], list[int]] = {}
        self._greedy = greedy
        propose = EagleProposer.propose

        def recorded(proposer: EagleProposer, slots: Sequence[DraftSlot]) -> None:
            propose(proposer, slots)
            for slot in slots:
                self.drafts[slot.request.request_id, slot.request.num_tokens] = slot.request.draft_token_ids.copy()

        monkeypatch.setattr(EagleProposer, "propose", recorded)

    def run(self, files: ModelFiles, speculation: SpeculationConfig) -> list[list[int]]:
        prompts, sampling = requests()
        if self._greedy:
            sampling = [SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0) for _ in sampling]
        return Engine(files, SETTING, speculation, dtype="auto").generate(prompts, sampling)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_same_drafts(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: str, greedy: bool
) -> None:
    speculation = SpeculationConfig(
        method="eagle3",
        draft=str(make_draft_directory(tmp_path, files)),
        vocabulary=vocabulary,
        dynamic=DynamicConfig(max_sessions=3),  # one sequence has none
        num_speculative_tokens=5,
        adaptive=False,
    )
    with monkeypatch.context() as patch:
        chains = DraftsTaken(patch, greedy)
        outputs = chains.run(files, speculation)
    with monkeypatch.context() as patch:
        patch.setattr(DraftHead, "make_chain", lambda *_: None)
        one_by_one = DraftsTaken(patch, greedy)
        assert one_by_one.run(files, speculation) == outputs
    assert chains.drafts == one_by_one.drafts
    assert max(map(len, chains.drafts.values())) == 5
    assert len({tuple(drafts) for drafts in chains.drafts.values()}) > NUM_TOKENS
