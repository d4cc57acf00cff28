"""Streams of prompts that a draft may learn from while it serves, and trial prompts to choose options on.

Both are of the items that evaluation does not use, and share no text with an evaluation prompt; no draft was trained on
the law and medicine among them. Evaluation prompts are for final figures only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from benchmarks.prompts.build import EVAL_PATH, Prompt, build_train, in_turn, read, shuffled, write
from benchmarks.prompts.sets import short
from benchmarks.prompts.sources import CACHE, SOURCES
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer

STREAM_PATH = CACHE / "stream.jsonl"
STREAM_DOMAINS = ("code", "law", "medicine")
_TRIAL_EVERY = 6


def build_stream(evaluation: Sequence[Prompt]) -> list[Prompt]:
    """All stream prompts, the domains one after another, none near any prompt in ``evaluation``."""
    return [
        replace(prompt, split="stream")
        for domain in STREAM_DOMAINS
        for prompt in in_turn(
            build_train(evaluation, [source])
            for source in SOURCES
            if source.domain == domain and source.package.kind == "pypi" and not source.eval_only
        )
    ]


def read_stream(path: Path = STREAM_PATH) -> list[Prompt]:
    """The stream prompts, built (in about a minute) where the file is not there yet."""
    if not path.exists():
        write(path, build_stream(read(EVAL_PATH)))
    return read(path)


def stream_and_trial(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and every sixth: for choosing options, by which nothing was learned."""
    rows = [prompts[start : start + _TRIAL_EVERY] for start in range(0, len(prompts), _TRIAL_EVERY)]
    stream = list(chain.from_iterable(row[: _TRIAL_EVERY - 1] for row in rows))
    return stream, list(chain.from_iterable(row[_TRIAL_EVERY - 1 :] for row in rows))


def trial_prompts(model: str, count: int) -> list[Prompt]:
    """``count`` trial prompts of each domain, in an order that has nothing to do with their sources."""
    tokenizer, prompts = Tokenizer.from_files(resolve_model(ModelConfig(name=model))), read_stream()
    chosen = []
    for domain in STREAM_DOMAINS:
        _, trial = stream_and_trial([prompt for prompt in prompts if prompt.domain == domain])
        chosen += shuffled(short(trial, domain, tokenizer))[:count]
    return chosen
