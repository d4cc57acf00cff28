"""Texts of an engine whose model is on some ranks: ``python -m tests.sharded_texts RANKS MODEL DRAFT RESULT``."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

from evospec.engine.config import SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.models.config import ModelFiles
from tests.tiny_drafts import Engine, Setting

NUM_TOKENS = 24
SETTING = Setting(prefix_caching=True, max_batched_tokens=64, num_blocks=9)
"""Prompts come in chunks, and blocks are too few."""


class Texts(msgspec.Struct):
    """What an engine has answered, and how that went."""

    outputs: list[list[int]]
    num_accepted: int
    num_cached: int
    num_preemptions: int


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """Random prompts, one of them the beginning of another; every second request is sampled, in its own way."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (60, 30, 30, 30)]
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=1, temperature=0.0)
    sampled = msgspec.structs.replace(greedy, temperature=0.9, top_p=0.95)
    penalized = msgspec.structs.replace(greedy, temperature=0.7, repetition_penalty=1.3)
    return [*prompts, prompts[0][:50]], [greedy, sampled, greedy, penalized, greedy]


def generate(files: ModelFiles, draft: Path, num_ranks: int) -> Texts:
    """All requests together, and the last one again, with a draft, sessions' vocabularies and cached prefixes."""
    speculation = SpeculationConfig(
        method="eagle3", draft=str(draft), adaptive=False, num_speculative_tokens=2, vocabulary="dynamic:65+33"
    )
    engine, (prompts, sampling) = Engine(files, SETTING, speculation, num_ranks=num_ranks), requests()
    outputs = [*engine.generate(prompts, sampling), *engine.generate(prompts[-1:], sampling[-1:])]
    return Texts(outputs, engine.num_accepted, engine.num_cached_tokens, engine.core.stats().preemptions)


if __name__ == "__main__":
    path = Path(sys.argv[2])
    texts = generate(ModelFiles(path.name, path, "safetensors"), Path(sys.argv[3]), int(sys.argv[1]))
    Path(sys.argv[4]).write_bytes(msgspec.json.encode(texts))
