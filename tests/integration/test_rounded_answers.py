"""On the compiled kernels, whose sums are rounded, nothing but a request decides its answer.

Neither what is cached nor who is preempted does. With AMX prompts are rounded otherwise than what is decoded.
"""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from gguf import GGMLQuantizationType

from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.kernels import native
from tests.tiny_drafts import Engine, Setting
from tests.tiny_models import VOCAB_SIZE, make_directory, make_gguf

NUM_TOKENS, NUM_PROMPTS = 40, 8
SAMPLED = SamplingParams(max_tokens=NUM_TOKENS, seed=3, temperature=1.0, ignore_eos=True)
"""Of a random model all tokens are nearly as likely, so a rounding soon shows."""

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason="no compiled kernels")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    directory = tmp_path_factory.mktemp("model")
    make_directory(directory, hidden_size=128, head_dim=32, num_hidden_layers=6, max_position_embeddings=512)
    return make_gguf(directory / "model.gguf", directory, GGMLQuantizationType.Q4_1)


def answers(files: ModelFiles, prompts: list[list[int]], setting: Setting, at_once: int) -> tuple[list[list[int]], int]:
    """So many at a time; and how many sequences were preempted."""
    engine = Engine(files, setting, dtype="auto")
    starts = [*range(0, len(prompts), at_once), len(prompts)]
    parts = (engine.generate(prompts[a:b], [SAMPLED] * (b - a)) for a, b in pairwise(starts))
    return list(chain.from_iterable(parts)), engine.core.stats().preemptions


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB_SIZE, (31,), generator=generator).tolist() for _ in range(NUM_PROMPTS)]


def test_a_conversation_goes_on_the_same_whether_its_answer_is_cached(
    files: ModelFiles, prompts: list[list[int]]
) -> None:
    alone, cached = Setting(num_blocks=256), Setting(prefix_caching=True, num_blocks=256)
    first, _ = answers(files, prompts, alone, 1)
    turns = [part for prompt, answer in zip(prompts, first, strict=True) for part in (prompt, [*prompt, *answer, 7])]
    expected, _ = answers(files, turns, alone, 1)
    assert answers(files, turns, cached, 1)[0] == expected


def test_a_preempted_sequence_goes_on_the_same(files: ModelFiles, prompts: list[list[int]]) -> None:
    expected, _ = answers(files, prompts, Setting(num_blocks=256), 1)
    found, num_preempted = answers(files, prompts, Setting(num_blocks=18), NUM_PROMPTS)
    assert num_preempted > 2
    assert found == expected
