"""SmolLM2 in the whole float32 engine against ``transformers``, token for token; scheduling never shows in the output.

Greedy output equals ``transformers`` greedy on 20 prompts of 1 to 178 tokens, 64 tokens each: alone, in a batch of 8,
with and without prefix caching, with chunked prefill, and after preemption. Sampled output (6 prompts, 40 tokens) is
the same in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.core import EngineCore
from engine.messages import EngineRequest, SamplingParams
from engine.models.config import ModelFiles
from engine.models.registry import validate_model_files
from engine.text.tokenizer import Tokenizer
from tests.reference_logits import check_logits, transformers_model

NUM_TOKENS = 64
SAMPLED_TOKENS = 40
MIN_MARGIN = 1e-3
"""A smaller gap between the two largest logits could be rounding (1e-4), and equality luck."""
CLIENT = b"test"
SHORT = 32
"""Tokens: a batch is padded to its longest prompt."""
THREADS = 1
"""Two took 29 to 36 ms for a step of one sequence on idle cores, against 49 to 51, and far longer on busy ones."""

TEXTS = [
    "The capital of France is",
    "Hello",
    "def fibonacci(n):\n",
    "Write a haiku about the sea.",
    "1, 1, 2, 3, 5, 8, 13,",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Dear Sir or Madam,\n",
    "Q: Why is the sky blue?\nA:",
    "The patient presented with fever, cough and",
    "SELECT name, COUNT(*) FROM orders",
    "Größe und Gewicht: Die Maße des Körpers sind",
    "This Agreement shall be governed by the laws of",
    "To be, or not to be, that is the question:",
    "List three prime numbers greater than one hundred and explain why each of them is prime.",
    "Photosynthesis is the process by which green plants and some other organisms use sunlight to",
]
CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + "
EXCERPTS = [(0, 40), (5, 100), (20, 160), (0, 178), (50, 66)]
"""Longer prompts: these tokens of all texts, two of them with a prefix in common."""


@dataclass(frozen=True)
class Setting:
    """How an engine schedules."""

    prefix_caching: bool = True
    max_num_seqs: int = 10
    max_batched_tokens: int = 512
    num_blocks: int = 256


PLAIN = Setting(prefix_caching=False)
SETTINGS = {
    "batch of 8": Setting(max_num_seqs=8),
    "chunked prefill": Setting(prefix_caching=False, max_batched_tokens=20),
    "preemption": Setting(num_blocks=22),
}


class Engine:
    """An ``EngineCore`` in this process, stepped until its requests are done."""

    def __init__(self, files: ModelFiles, setting: Setting) -> None:
        config = EngineConfig(
            model=ModelConfig(dtype="float32"),
            cache=CacheConfig(prefix_caching=setting.prefix_caching, num_blocks=setting.num_blocks),
            scheduler=SchedulerConfig(max_num_seqs=setting.max_num_seqs, max_batched_tokens=setting.max_batched_tokens),
            runtime=RuntimeConfig(device="cpu", attention_backend="torch", threads=THREADS),
        )
        self.core = EngineCore(config, files, validate_model_files(files))
        self._setting = setting
        self._ids = count()
        self.num_cached_tokens = 0
        self.largest_batch = 0
        self.largest_step = 0

    def generate(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[list[int]]:
        """Output token ids of all prompts, given to the engine at once."""
        ids = [str(next(self._ids)) for _ in prompts]
        for request_id, prompt, params in zip(ids, prompts, sampling, strict=True):
            self.core.add(
                CLIENT,
                EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=params, tenant="tests"),
            )
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        unfinished = set(ids)
        preemptions_before = self.core.stats().preemptions
        while unfinished:
            outputs, timings = self.core.step()
            if timings is not None:
                self.largest_batch = max(self.largest_batch, timings.num_sequences)
                self.largest_step = max(self.largest_step, timings.num_tokens)
            for output in outputs[CLIENT]:
                assert output.error is None
                tokens[output.request_id] += output.token_ids
                if output.finish_reason is not None:
                    self.num_cached_tokens += output.num_cached_tokens
                    unfinished.remove(output.request_id)
        assert self.core.stats().blocks_used == 0
        preempted = self.core.stats().preemptions > preemptions_before
        assert preempted == (self._setting is SETTINGS["preemption"])
        return [tokens[request_id] for request_id in ids]

    def generate_alone(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[list[int]]:
        """The same, one request after the other."""
        return [self.generate([prompt], [params])[0] for prompt, params in zip(prompts, sampling, strict=True)]


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)


SAMPLED_PROMPTS = slice(-6, None)
SAMPLED = [SamplingParams(max_tokens=SAMPLED_TOKENS, seed=seed, temperature=0.8, ignore_eos=True) for seed in range(6)]


@pytest.fixture(scope="module")
def files(smollm2_path: Path) -> ModelFiles:
    return ModelFiles("smollm2-135m", smollm2_path, "gguf")


@pytest.fixture(scope="module")
def prompts(files: ModelFiles) -> list[list[int]]:
    tokenizer = Tokenizer.from_files(files)
    everything = tokenizer.encode("\n".join(TEXTS))
    return [*(tokenizer.encode(text) for text in TEXTS), *(everything[begin:end] for begin, end in EXCERPTS)]


@pytest.fixture(scope="module")
def reference(files: ModelFiles) -> Any:
    torch.set_num_threads(THREADS)
    return transformers_model(files)


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy output of ``transformers``, in left-padded batches of short and of long prompts.

    One by one gave the same tokens on 20 such prompts, checked once by hand; it took twenty times as long.
    """
    reference.generation_config.eos_token_id = None  # go on to the last token
    tokens: dict[int, list[int]] = {}
    for is_long in (False, True):
        places = [place for place, prompt in enumerate(prompts) if (len(prompt) > SHORT) == is_long]
        tokens |= zip(places, generate(reference, [prompts[place] for place in places]), strict=True)
    return [tokens[place] for place in range(len(prompts))]


def generate(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    token_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = reference.generate(
        token_ids,
        attention_mask=mask,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(generated.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > MIN_MARGIN, "choose prompts without near ties"
    tokens: list[list[int]] = generated.sequences[:, width:].tolist()
    assert {len(row) for row in tokens} == {NUM_TOKENS}
    return tokens


@pytest.fixture(scope="module")
def plain(files: ModelFiles) -> Engine:
    return Engine(files, PLAIN)


@pytest.fixture(scope="module")
def sampled_alone(plain: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return plain.generate_alone(prompts[SAMPLED_PROMPTS], SAMPLED)


@pytest.fixture(scope="module", params=SETTINGS)
def engine(request: pytest.FixtureRequest, files: ModelFiles) -> Iterator[Engine]:
    engine = Engine(files, SETTINGS[request.param])
    yield engine
    # Each setting did what it is for (preemption is checked in each run).
    setting = SETTINGS[request.param]
    assert engine.largest_step <= setting.max_batched_tokens
    if request.param == "batch of 8":
        assert engine.largest_batch == 8
        assert engine.num_cached_tokens > 0


def test_greedy_alone(plain: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert plain.generate_alone(prompts, [greedy()] * len(prompts)) == expected


def test_greedy_together(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert engine.generate(prompts, [greedy()] * len(prompts)) == expected


def test_sampled_together(engine: Engine, prompts: list[list[int]], sampled_alone: list[list[int]]) -> None:
    assert engine.generate(prompts[SAMPLED_PROMPTS], SAMPLED) == sampled_alone


def test_sampled_output_depends_on_the_seed(plain: Engine, prompts: list[list[int]]) -> None:
    first, second = plain.generate(prompts[:1] * 2, SAMPLED[:2])
    assert first != second


def test_logits(files: ModelFiles, reference: Any) -> None:
    # Measured: 6e-5 apart in float32, where logits have a standard deviation of 6.7.
    check_logits(files, reference, Tokenizer.from_files(files).encode(CODE), atol=5e-4)
