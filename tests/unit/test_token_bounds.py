"""The least number of tokens of a text is never more than it has."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import VOCAB_SIZE, tiny_tokenizer

TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from("ea <|>\u0301\u0323\u0338\u0345\u1100\u1161\u11a8\x7f"))


def make(normalizer: Any = None) -> Tokenizer:
    backend = tiny_tokenizer()
    backend.normalizer = normalizer
    return Tokenizer(backend, VOCAB_SIZE, None, (), None)


PLAIN, NFC = make(), make(normalizers.NFC())
SPECIAL = sorted(PLAIN.backend.get_added_tokens_decoder().items())[0][1].content


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS | st.just(SPECIAL)).map("".join))
@example(f"{SPECIAL}\u0338" * 20)
@example("e\u0323\u0301" * 20)
@pytest.mark.parametrize("tokenizer", [PLAIN, NFC], ids=["plain", "nfc"])
def test_no_text_has_fewer_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def backend_of_few_tokens() -> tokenizers.Tokenizer:
    """Tokens a, aa, aaaa and b; no other byte has one."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "aa": 2, "aaaa": 3}, [("a", "a"), ("aa", "aa")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def test_a_byte_counts_by_the_longest_token_that_has_it_and_nothing_without_one() -> None:
    tokenizer = Tokenizer(backend_of_few_tokens(), 4, None, (), None)
    texts = {"c" * 9: 0, "a" * 800: 199, "b" * 800: 799, "ab" * 400: 499}
    assert {text: tokenizer.least_tokens(text) for text in texts} == texts
    assert [len(tokenizer.encode(text)) for text in texts] == [0, 200, 800, 800]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Lowercase()},
        {"pre_tokenizer": None},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel()])},
        {"added": AddedToken("<m>", lstrip=True)},
    ],
)
def test_tokenizers_that_may_drop_text_are_bounded_by_characters_only(change: dict[str, Any]) -> None:
    backend = backend_of_few_tokens()
    if "added" in change:
        backend.add_special_tokens([change.pop("added")])
    for name, value in change.items():
        setattr(backend, name, value)
    assert Tokenizer(backend, 5, None, (), None).least_tokens("b" * 800) == 200


def test_any_number_of_marks_is_put_in_order_soon() -> None:
    """Python's own normalisation takes minutes for these."""
    text = "a" + "\u0301" * 150_000 + "\u0316" * 150_000
    started = time.process_time()
    assert 0 < NFC.least_tokens(text) < len(text.encode())
    assert time.process_time() - started < 10
