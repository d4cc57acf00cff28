"""SmolLM2 in the whole float32 engine against ``transformers``, token for token; scheduling never shows in the output.

Greedy output equals ``transformers`` greedy on 20 prompts of 1 to 178 tokens, 64 tokens each: that of the model's first
layers alone, in a batch of 8, with and without prefix caching, with chunked prefill, and after preemption; and on 10 of
them, 32 tokens each, that of the whole model with its draft, in a batch of 8 with chunked prefill. Sampled output (6
prompts, 40 tokens) is the same in all of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from evospec.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.core import EngineCore
from evospec.engine.loader import LoadedModel, load
from evospec.engine.messages import EngineRequest, SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import validate_model_files
from evospec.engine.text.tokenizer import Tokenizer
from tests.reference_logits import check_logits, transformers_model

NUM_TOKENS, FEW_TOKENS = 48, 20
SAMPLED_TOKENS = 32
"""All outputs go over the end of a block of 16 tokens, most of them more than once."""
MIN_MARGIN = 1e-3
"""A smaller gap between the two largest logits could be rounding (1e-4), and equality luck."""
CLIENT = b"test"
NUM_LAYERS = 4
"""Of the 30: all layers are alike to what schedules them, and a step of these takes a third of the time."""
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
    drafts: Literal["eagle3", "ngram"] = "ngram"


WHOLE_MODEL = Setting(max_num_seqs=8, max_batched_tokens=64, drafts="eagle3")
PLAIN = Setting(prefix_caching=False)
BATCH_OF_8 = Setting(max_num_seqs=8)
CHUNKED_PREFILL = Setting(prefix_caching=False, max_batched_tokens=20)
PREEMPTION = Setting(num_blocks=22)


def config_of(setting: Setting) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(dtype="float32"),
        cache=CacheConfig(prefix_caching=setting.prefix_caching, num_blocks=setting.num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=setting.max_num_seqs, max_batched_tokens=setting.max_batched_tokens),
        speculation=SpeculationConfig(method=setting.drafts, adaptive=False),
        runtime=RuntimeConfig(device="cpu", attention_backend="torch", threads=THREADS),
    )


class Engine:
    """An ``EngineCore`` in this process, stepped until its requests are done; all of them share the weights."""

    def __init__(self, files: ModelFiles, setting: Setting, target: LoadedModel) -> None:
        self.core = EngineCore(config_of(setting), files, target.spec, target=target)
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
        assert preempted == (self._setting is PREEMPTION)
        return [tokens[request_id] for request_id in ids]

    def generate_alone(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[list[int]]:
        """The same, one request after the other."""
        return [self.generate([prompt], [params])[0] for prompt, params in zip(prompts, sampling, strict=True)]


def greedy(max_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)


SAMPLED_PROMPTS = slice(-6, None)
EVERY_OTHER = slice(None, None, 2)
"""Prompts of all lengths, where a token takes long: of the whole model, and of requests one after the other."""
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
def target(files: ModelFiles) -> LoadedModel:
    """The first layers."""
    spec = validate_model_files(files)
    return load(config_of(PLAIN), files, dataclasses.replace(spec, layers=spec.layers[:NUM_LAYERS]))


@pytest.fixture(scope="module")
def reference(files: ModelFiles) -> Any:
    return transformers_model(files)


@contextmanager
def first_layers(reference: Any) -> Iterator[None]:
    """``reference`` has no others as long as the block lasts."""
    layers = reference.model.layers
    reference.model.layers = layers[:NUM_LAYERS]
    try:
        yield
    finally:
        reference.model.layers = layers


@pytest.fixture(scope="module")
def plain(files: ModelFiles, target: LoadedModel) -> Engine:
    return Engine(files, PLAIN, target)


@pytest.fixture(scope="module")
def batch(files: ModelFiles, target: LoadedModel) -> Engine:
    return Engine(files, BATCH_OF_8, target)


@pytest.fixture(scope="module", params=[CHUNKED_PREFILL, PREEMPTION], ids=["chunked prefill", "preemption"])
def engine(request: pytest.FixtureRequest, files: ModelFiles, target: LoadedModel) -> Iterator[Engine]:
    engine = Engine(files, request.param, target)
    yield engine
    # Each setting did what it is for (preemption is checked in each run).
    assert engine.largest_step <= request.param.max_batched_tokens


@pytest.fixture(scope="module")
def expected(batch: Engine, prompts: list[list[int]], reference: Any) -> list[list[int]]:
    """Greedy output of a batch, found to be that of ``transformers``."""
    outputs = batch.generate(prompts, [greedy()] * len(prompts))
    with first_layers(reference):
        check_greedy(reference, prompts, outputs)
    return outputs


def check_greedy(reference: Any, prompts: list[list[int]], outputs: list[list[int]]) -> None:
    """``reference`` would choose each token after those before it: then its own greedy output is the same."""
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits[0]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MIN_MARGIN, "choose prompts without near ties"
        assert output == logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def sampled_alone(plain: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return plain.generate_alone(prompts[SAMPLED_PROMPTS], SAMPLED)


def test_greedy_of_the_whole_model(files: ModelFiles, prompts: list[list[int]], reference: Any) -> None:
    engine = Engine(files, WHOLE_MODEL, load(config_of(WHOLE_MODEL), files, validate_model_files(files)))
    some = prompts[EVERY_OTHER]
    check_greedy(reference, some, engine.generate(some, [greedy(FEW_TOKENS)] * len(some)))


def test_greedy_alone(plain: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    some = prompts[EVERY_OTHER]
    assert plain.generate_alone(some, [greedy()] * len(some)) == expected[EVERY_OTHER]


def test_greedy_together(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert engine.generate(prompts, [greedy()] * len(prompts)) == expected


def test_sampled_in_a_batch(batch: Engine, prompts: list[list[int]], sampled_alone: list[list[int]]) -> None:
    assert batch.generate(prompts[SAMPLED_PROMPTS], SAMPLED) == sampled_alone


def test_sampled_together(engine: Engine, prompts: list[list[int]], sampled_alone: list[list[int]]) -> None:
    assert engine.generate(prompts[SAMPLED_PROMPTS], SAMPLED) == sampled_alone


@pytest.mark.usefixtures("expected")
def test_a_batch_is_of_8_and_shares_prefixes(batch: Engine) -> None:
    assert batch.largest_batch == 8
    assert batch.num_cached_tokens > 0


def test_sampled_output_depends_on_the_seed(plain: Engine, prompts: list[list[int]]) -> None:
    first, second = plain.generate(prompts[:1] * 2, SAMPLED[:2])
    assert first != second


def test_logits(files: ModelFiles, reference: Any) -> None:
    # Measured: 6e-5 apart in float32, where logits have a standard deviation of 6.7.
    check_logits(files, reference, Tokenizer.from_files(files).encode(CODE), atol=5e-4)
