"""Training features that the engine records while it generates are those of the whole text computed at once."""

from __future__ import annotations

from pathlib import Path

import torch

from evospec.adapters.training.generate import FeatureRecorder, Generator, Job
from evospec.engine.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from evospec.engine.core import EngineCore
from evospec.engine.messages import EngineRequest, SamplingParams
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import validate_model_files
from evospec.engine.request import engine_request_id
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_directory

CLIENT = b"test"
LAYERS = (0, 2)


def make_core(files: ModelFiles, recorder: FeatureRecorder, num_blocks: int) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(dtype="float32"),
        cache=CacheConfig(num_blocks=num_blocks, prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=4, max_batched_tokens=16),  # prompts go in chunks
        speculation=SpeculationConfig(num_speculative_tokens=0, adaptive=False),
        runtime=RuntimeConfig(device="cpu", attention_backend="torch", threads=1),
    )
    return EngineCore(config, files, validate_model_files(files), draft=recorder)


def record(
    files: ModelFiles, prompts: list[list[int]], max_tokens: int, num_blocks: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features of each prompt with its answer, the answer's last token aside, and the tokens they are of."""
    recorder = FeatureRecorder(LAYERS)
    core = make_core(files, recorder, num_blocks)
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True)
        core.add(CLIENT, EngineRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, tenant="t"))
    answers: list[list[int]] = [[] for _ in prompts]
    finished: dict[int, torch.Tensor] = {}
    while len(finished) < len(prompts):
        outputs, _ = core.step()
        for output in outputs[CLIENT]:
            number = int(output.request_id)
            answers[number] += output.token_ids
            if output.finish_reason is not None:
                finished[number] = recorder.take(engine_request_id(CLIENT, output.request_id))
    tokens = [torch.tensor([*prompt, *answer][:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
    for number, text in enumerate(tokens):
        assert len(finished[number]) == len(text)
    return [finished[number] for number in range(len(prompts))], tokens


def test_recorded_features(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "tiny")
    prompts = [list(range(10 + n, 50 + 5 * n)) for n in range(4)]
    # So few blocks that sequences are preempted and computed again.
    recorded, texts = record(files, prompts, max_tokens=40, num_blocks=18)
    for features, text in zip(recorded, texts, strict=True):
        (whole,), _ = record(files, [text.tolist()], max_tokens=1, num_blocks=18)
        torch.testing.assert_close(features.float(), whole.float(), rtol=2**-7, atol=1e-2)


def test_a_given_answer_is_read(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "tiny")
    tokenizer = Tokenizer.from_files(files)
    recorder = FeatureRecorder(LAYERS)
    generator = Generator(
        make_core(files, recorder, num_blocks=64), recorder, tokenizer, 2, max_tokens=9, max_prompt=99
    )
    jobs = [Job(str(number), "How do dogs sleep?", 0, "The fox runs. " * (number + 1)) for number in range(5)]
    read = {conversation.key: (conversation, features) for conversation, features in generator.run(iter(jobs))}
    assert len(read) == len(jobs)
    question = tokenizer.apply_chat_template([{"role": "user", "content": jobs[0].text}])
    for job in jobs:
        conversation, features = read[job.key]
        text = tokenizer.encode(question, add_special_tokens=False) + tokenizer.encode(job.given or "")
        assert conversation.token_ids.tolist() == text
        assert tokenizer.decode(text[conversation.prompt_length :]) == job.given
        (whole,), _ = record(files, [text], max_tokens=1, num_blocks=18)
        torch.testing.assert_close(features.float(), whole.float(), rtol=2**-7, atol=1e-2)
