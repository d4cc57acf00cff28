"""What an engine that drafts answers has the model's distribution: the first three tokens, by exact enumeration.

The draft is the target itself, without penalties: it is often right and often wrong. Seeds are fixed, so nothing
flickers; a right engine would fail for one choice of seeds in 10,000. Two bugs show that the test would see them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.request import Request
from evospec.engine.sampling import sampler
from evospec.engine.sampling.choose import SamplingState
from evospec.engine.sampling.processors import LogitsEdits
from evospec.engine.sampling.sampler import SamplingRows
from evospec.kernels.choose_tokens import RowSampling
from tests.exact_distribution import distribution, edited
from tests.reference_logits import transformers_model
from tests.tiny_drafts import Engine, Setting
from tests.tiny_models import make_directory
from tests.unit.chi_square import chi_square_p

FALSE_ALARM = 1e-4
NUM_SEEDS, NUM_TO_SEE_BUGS = 20_000, 5_000
AT_ONCE = 128
PROMPT = [30, 5, 9, 9]
SETTING = Setting(max_num_seqs=AT_ONCE, max_batched_tokens=2048, num_blocks=2 * AT_ONCE)


def params(seed: int) -> SamplingParams:
    """Penalties below their neutral values, so that tokens come again: which those are depends on the history."""
    return SamplingParams(
        max_tokens=3,
        seed=seed,
        ignore_eos=True,
        temperature=1.5,
        top_k=4,
        presence_penalty=-2.0,
        frequency_penalty=-1.5,
        repetition_penalty=0.7,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Of one layer: what is tested comes after the logits, whatever they are."""
    return make_directory(tmp_path_factory.mktemp("target") / "target", num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> dict[tuple[int, ...], float]:
    """The chance of every three tokens, from the logits of an independent implementation."""
    model = transformers_model(files)

    def extend(output: tuple[int, ...], chance: float) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(output) == 3:
            yield output, chance
            return
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + list(output)])).logits[0, -1].tolist()
        p = params(0)
        for token, next_chance in enumerate(distribution(edited(logits, p, PROMPT, list(output)), p)):
            if next_chance > 0:
                yield from extend((*output, token), chance * next_chance)

    return dict(extend((), 1.0))


@dataclass(frozen=True)
class Sampled:
    """How often each three tokens came, and the share of drafts that were accepted."""

    counts: Counter[tuple[int, ...]]
    accepted: float

    def p_value(self, expected: dict[tuple[int, ...], float]) -> float:
        if not self.counts.keys() <= expected.keys():
            return 0.0
        counts = torch.tensor([self.counts[tokens] for tokens in expected])
        return chi_square_p(counts, torch.tensor(list(expected.values()), dtype=torch.float64))


def sample(files: ModelFiles, num_seeds: int) -> Sampled:
    draft = SpeculationConfig(
        method="draft_model", draft=str(files.path), adaptive=False, num_speculative_tokens=2, vocabulary="full"
    )
    engine = Engine(files, SETTING, draft)
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_seeds, AT_ONCE):
        requests = [params(seed) for seed in range(first, min(first + AT_ONCE, num_seeds))]
        counts.update(map(tuple, engine.generate([PROMPT] * len(requests), requests)))
    return Sampled(counts, engine.num_accepted / engine.num_drafted)


def test_three_tokens_follow_the_exact_joint_distribution(
    files: ModelFiles, expected: dict[tuple[int, ...], float]
) -> None:
    """20,000 seeds over 64 outcomes."""
    assert len(expected) == 4**3
    sampled = sample(files, NUM_SEEDS)
    assert 0.2 < sampled.accepted < 0.8
    assert sampled.p_value(expected) > FALSE_ALARM


def test_noise_that_is_used_again_at_the_next_position_is_seen(
    files: ModelFiles, expected: dict[tuple[int, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sampler._sampling_and_positions

    def same_position(rows: list[SamplingRows]) -> tuple[RowSampling | None, list[int]]:
        of_rows = [(row.request, 1 + len(row.draft_token_ids)) for row in rows]
        places = [len(r.prompt_token_ids) + len(r.output_token_ids) for r, count in of_rows for _ in range(count)]
        return right(rows)[0], places

    monkeypatch.setattr(sampler, "_sampling_and_positions", same_position)
    assert sample(files, NUM_TO_SEE_BUGS).p_value(expected) < FALSE_ALARM


def test_penalties_that_do_not_know_of_the_drafts_are_seen(
    files: ModelFiles, expected: dict[tuple[int, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LogitsEdits.add_sequence

    def forgetful(
        self: LogitsEdits, start: int, request: Request, draft_token_ids: tuple[int, ...], state: SamplingState
    ) -> None:
        for row in range(start, start + 1 + len(draft_token_ids)):
            right(self, row, request, (), state)

    monkeypatch.setattr(LogitsEdits, "add_sequence", forgetful)
    assert sample(files, NUM_TO_SEE_BUGS).p_value(expected) < FALSE_ALARM
