"""Text from tokens in any split, and hold-back of stop strings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.text.detokenizer import IncrementalDetokenizer, StopStringBuffer, StopStringFinder
from evospec.engine.text.tokenizer import Tokenizer

SPECIAL = "<|end|>"


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE with few merges, so that most characters beyond ASCII span tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[SPECIAL], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([Path(__file__).read_text(), "naïve café – 日本語のテキスト 🙂🙃🙂"] * 3, trainer)
    end = backend.token_to_id(SPECIAL)
    assert end is not None
    return Tokenizer(backend, backend.get_vocab_size() + 3, None, (end,), None)


TOKENIZER = byte_level_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("é日🙂👨‍👩‍👧ा"), max_size=40)


@st.composite
def splits(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@given(st.data(), TEXT)
def test_any_split_of_any_text(data: st.DataObject, text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER.token_bytes)
    pieces = [detokenizer.push(part) for part in data.draw(splits(TOKENIZER.encode(text)))]
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""


@given(st.data(), st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_tokens_give_the_decoding_of_all(data: st.DataObject, ids: list[int]) -> None:
    """Also sequences no text encodes to: broken UTF-8, special tokens, ids without a token."""
    detokenizer = IncrementalDetokenizer(TOKENIZER.token_bytes)
    text = "".join(detokenizer.push(part) for part in data.draw(splits(ids))) + detokenizer.finish()
    assert text == TOKENIZER.decode(ids)


@given(TEXT)
def test_pieces_are_beginnings_of_the_text(text: str) -> None:
    """After each token: no replacement character that a later token would have completed."""
    detokenizer = IncrementalDetokenizer(TOKENIZER.token_bytes)
    so_far = ""
    for token_id in TOKENIZER.encode(text):
        so_far += detokenizer.push([token_id])
        assert text.startswith(so_far)


def test_incomplete_character_at_the_end_is_one_replacement() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER.token_bytes)
    ids = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) in (b"\xf0", b"\x9f")]
    assert len(ids) == 2
    ids.sort(key=TOKENIZER.token_bytes, reverse=True)
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == "\ufffd"


SHORT = st.text("a🙂", min_size=1, max_size=4)
PIECES = st.lists(st.text("a🙂c", max_size=5), max_size=8)


def first_complete(text: str, stop: list[str]) -> tuple[str, int] | None:
    """The definition: read character by character until the text ends with a stop string; the longest, if several."""
    for end in range(len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            longest = max(found, key=len)
            return longest, end - len(longest)
    return None


@given(st.lists(SHORT, max_size=4), PIECES)
def test_finder_finds_what_is_complete_first(stop: list[str], pieces: list[str]) -> None:
    finder = StopStringFinder(stop)
    found = next((match for piece in pieces if (match := finder.push(piece))), None)
    assert found == first_complete("".join(pieces), stop)


class CountedText(str):
    """Counts the characters that searches in it may compare; what it is put behind counts as well."""

    num_compared = 0

    def __radd__(self, before: str) -> CountedText:
        return CountedText(f"{before}{self}")

    def find(self, string: str, start: Any = 0, end: Any = None) -> int:
        CountedText.num_compared += len(string) * (len(self) - start)
        return super().find(string, start, end)

    def __getitem__(self, places: Any) -> CountedText:
        CountedText.num_compared += len(range(len(self))[places]) if isinstance(places, slice) else 1
        return CountedText(super().__getitem__(places))

    def __iter__(self) -> Iterator[str]:
        CountedText.num_compared += len(self)
        return super().__iter__()


def test_stop_strings_of_equal_characters_take_no_longer_than_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all of each is found again at every space. A character is looked at a few times, not 254 times 16."""
    monkeypatch.setattr(CountedText, "num_compared", 0)
    finder = StopStringFinder([f"{' ' * (254 - number)}x{' ' * (number + 1)}" for number in range(16)])
    for _ in range(10):
        finder.push(CountedText(" " * 128))
    assert CountedText.num_compared <= 5 * 10 * 128


@given(st.lists(SHORT, max_size=4), PIECES)
def test_buffer_streams_nothing_of_a_stop_string_and_loses_nothing(stop: list[str], pieces: list[str]) -> None:
    """As the server uses it: push until a stop string is found, then cut at its text length."""
    buffer, finder = StopStringBuffer(stop), StopStringFinder(stop)
    streamed, text = "", ""
    for piece in pieces:
        text += piece
        if match := finder.push(piece):
            assert len(streamed) <= match[1]
            assert (streamed + buffer.push(piece) + buffer.finish())[: match[1]] == text[: match[1]]
            return
        streamed += buffer.push(piece)
        held = text[len(streamed) :]
        assert text.startswith(streamed)
        assert not held or any(s.startswith(held) for s in stop), "held back without need"
    assert streamed + buffer.finish() == text


def test_buffer_without_stop_strings_holds_nothing() -> None:
    assert StopStringBuffer([]).push("abc") == "abc"


@pytest.mark.parametrize(
    ("piece", "released"), [("Hello", "Hello"), ("Hello\n", "Hello"), ("\n\nUs", ""), ("\nUser:", "\nUser:")]
)
def test_buffer_holds_the_longest_beginning(piece: str, released: str) -> None:
    assert StopStringBuffer(["\n\nUser:"]).push(piece) == released
