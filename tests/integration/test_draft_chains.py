"""Chains of drafts in one call are the chains that token by token gives, and leave behind the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evospec.engine.config import DynamicConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.request import Request
from evospec.engine.speculation.drafters.eagle import EagleProposer
from evospec.engine.speculation.drafters.head import DraftHead
from evospec.engine.speculation.length.policy import EarlyStop, LengthPolicy
from evospec.engine.step import DraftSlot, Proposal, Proposals
from evospec.kernels import native
from evospec.kernels.native_chain import CONFIDENCE_LEVELS, ChainBatch, ChainResult, NativeChain, StopRule
from tests.tiny_drafts import Engine, Setting, make_draft_directory
from tests.tiny_models import make_directory

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason="no compiled kernels")

VOCABULARIES = ["full", "static:96", "dynamic:96+32", "dynamic:full+0"]
NUM_TOKENS, TENANTS = 24, 3
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


def speculation_of(files: ModelFiles, directory: Path, vocabulary: str) -> SpeculationConfig:
    """Up to five tokens of a random draft in every step."""
    return SpeculationConfig(
        method="eagle3",
        draft=str(make_draft_directory(directory, files)),
        vocabulary=vocabulary,
        dynamic=DynamicConfig(max_sessions=3),  # one sequence has none
        num_speculative_tokens=5,
        adaptive=False,
    )


class DraftsTaken:
    """All drafts of an engine: by request and the number of tokens before them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, greedy: bool) -> None:
        self.drafts: dict[tuple[str, int], list[int]] = {}
        self._greedy = greedy
        propose = EagleProposer.propose

        def recorded(proposer: EagleProposer, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
            proposals = propose(proposer, slots, stop)
            for slot in slots:
                drafts = proposals.get(slot.request, Proposal()).token_ids.copy()
                self.drafts[slot.request.request_id, slot.request.num_tokens] = drafts
            return proposals

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
    speculation = speculation_of(files, tmp_path, vocabulary)
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


Call = tuple[ChainBatch, ChainResult]


class Stopping:
    """An engine whose chains end by made-up rules, and are cut at random before they are verified.

    Keeps what every call of the kernel was given, and gave, and what the policy was told of each chain: how many of its
    tokens were verified, how many there were, and what became of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call] = []
        self.judged: list[tuple[int, int, Sequence[bool]]] = []
        cut: dict[Request, int] = {}
        run, chance = NativeChain.run, np.random.default_rng(2)

        def recorded(chain: NativeChain, batch: ChainBatch, *arguments: Any) -> ChainResult:
            result = run(chain, batch, *arguments)
            self.calls.append((batch, result))
            return result

        def stop(policy: LengthPolicy, lengths: Mapping[Request, int]) -> EarlyStop:
            rule = StopRule(
                chances=chance.uniform(0.5, 1.0, (TENANTS, 2, CONFIDENCE_LEVELS)).astype(np.float32),
                verify_costs=chance.uniform(0.0, 0.2, max(lengths.values())).tolist(),
                draft_cost=float(chance.uniform(0.0, 1.2)),
            )
            tenants = {one: int(chance.integers(TENANTS)) for one in lengths}
            return EarlyStop(
                rule, tenants, {one: chance.uniform(0.3, 1.0, length).tolist() for one, length in lengths.items()}
            )

        def worth(policy: LengthPolicy, proposals: Proposals) -> list[int]:
            lengths = [int(chance.integers(0, len(one.confidence) + 1)) for one in proposals.values()]
            cut.update(zip(proposals, lengths, strict=True))
            return lengths

        def record(policy: LengthPolicy, request: Request, proposal: Proposal, outcomes: Sequence[bool]) -> None:
            self.judged.append((cut[request], len(proposal.confidence), outcomes))

        monkeypatch.setattr(NativeChain, "run", recorded)
        monkeypatch.setattr(LengthPolicy, "stop_rule", stop)
        monkeypatch.setattr(LengthPolicy, "worth_verifying", worth)
        monkeypatch.setattr(LengthPolicy, "record_drafts", record)


def steps_by_the_rule(batch: ChainBatch, levels: NDArray[np.int32]) -> int:
    """How many steps the chains of a call should have had; levels [S, B] of those they had."""
    stop, sampling = batch.stop, batch.sampling
    assert stop is not None
    sampled = [False] * len(batch.lengths) if sampling is None else [t > 0 for t in sampling.temperatures]
    promises = np.ones(len(batch.lengths))
    for step, of_step in enumerate(levels):
        going = [row for row, length in enumerate(batch.lengths) if length > step + 1]
        for row, length in enumerate(batch.lengths):
            if length > step:
                promises[row] *= stop.chances[batch.tenants[row], int(sampled[row]), of_step[row]]
        if not going:
            return step + 1
        gains = (promises[row] * batch.acceptance[row][step + 1] - stop.verify_costs[step + 1] for row in going)
        if sum(max(gain, 0.0) for gain in gains) <= stop.draft_cost:
            return step + 1
    raise AssertionError("a call made fewer steps than the rule allows")


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_chains_end_where_the_rule_says(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: str, greedy: bool
) -> None:
    """And change no output."""
    speculation = speculation_of(files, tmp_path, vocabulary)
    with monkeypatch.context() as patch:
        whole = DraftsTaken(patch, greedy).run(files, speculation)
    stopping = Stopping(monkeypatch)
    assert DraftsTaken(monkeypatch, greedy).run(files, speculation) == whole
    steps = []
    for batch, result in stopping.calls:
        assert result.confidence is not None
        levels = np.array(result.confidence).T
        steps.append(len(levels))
        assert steps[-1] == steps_by_the_rule(batch, levels)
    assert len(set(steps)) > 2
    for verified, drafted, outcomes in stopping.judged:
        # Of what was not verified, the first is judged by the target's last choice, where all before it were right.
        assert 1 <= len(outcomes) <= min(verified + 1, drafted)
        assert all(outcomes[:-1])
    assert any(verified == 0 for verified, _, _ in stopping.judged)


@pytest.mark.parametrize("vocabulary", ["full", "static:96"])
def test_how_sure_a_draft_is(
    files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: str
) -> None:
    """The chosen token's probability among the candidates, at the sequence's temperature; 1 for greedy ones."""
    stopping, seen, heads = Stopping(monkeypatch), set(), list[DraftHead]()
    make_chain = DraftHead.make_chain

    def recorded(head: DraftHead, *arguments: Any) -> NativeChain | None:
        heads.append(head)
        return make_chain(head, *arguments)

    monkeypatch.setattr(DraftHead, "make_chain", recorded)
    DraftsTaken(monkeypatch, greedy=False).run(files, speculation_of(files, tmp_path, vocabulary))
    for batch, result in stopping.calls:
        assert result.confidence is not None
        temperatures = [0.0] * len(batch.lengths) if batch.sampling is None else batch.sampling.temperatures
        for row, step in np.ndindex(np.shape(result.confidence)):
            if step < batch.lengths[row]:
                logits, token_ids = (one[0] for one in heads[0].candidates(result.hidden[step, row : row + 1]))
                shares = (logits.double() / (temperatures[row] or 1.0)).softmax(0)
                share = shares[token_ids == result.tokens[row][step]].item()
                assert abs(share * CONFIDENCE_LEVELS - (result.confidence[row][step] + 0.5)) < 0.501
                seen.add(result.confidence[row][step])
    assert len(seen) > 3
