"""Prompts that a model makes up: where it begins to speak as a user, and what may be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.in_process import Engine
from benchmarks.prompts.build import read_eval, shingles_of
from benchmarks.prompts.invented import invent, is_usable, user_turn
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, RuntimeConfig, SpeculationConfig
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_directory


def test_a_model_goes_on_where_the_user_speaks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_files(make_directory(tmp_path / "model"))
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(user_turn(tokenizer), skip_special_tokens=False) == said[: said.index("Hello")]


def test_every_seed_gives_one_text_the_same_each_time(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "model", seed=3)
    config = EngineConfig(
        model=ModelConfig(name=str(files.path)),
        cache=CacheConfig(num_blocks=256),
        runtime=RuntimeConfig(device="cpu", attention_backend="torch", threads=1),
        speculation=SpeculationConfig(method="none"),
    )

    def once() -> dict[int, str]:
        texts = list(invent(Engine(config), range(20, 32)))
        assert sorted(seed for seed, _ in texts) == list(range(20, 32))
        return dict(texts)

    texts = once()
    assert texts == once()
    assert "" in texts.values(), "one that did not come to an end"
    assert len(set(texts.values())) > 1


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("Write a poem about the sea.", True),
        ("Hello there, friend", False),
        ("Which symptoms does this disease have in children?", False),
        ("Is it legal to copy a book?", False),
        ("Are lawns better than laws of nature?", False),
        ("Are lawns better than meadows?", True),
    ],
)
def test_what_may_be_trained_on(text: str, usable: bool) -> None:
    assert is_usable(text, set()) == usable


def test_an_evaluation_prompt_may_not() -> None:
    known = shingles_of(read_eval())
    question = next(
        p.passage for p in read_eval(["general"]) if len(p.passage.split()) > 12 and is_usable(p.passage, set())
    )
    assert not is_usable(question, known)
    assert not is_usable(f"Please help me with this: {question}", known)
