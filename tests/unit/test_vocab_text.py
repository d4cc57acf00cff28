"""``evospec vocab add-text``: text says which of the tokens that answers seldom have come first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evospec.adapters.training import count_text
from evospec.adapters.training.count import write_counts
from evospec.engine.models.config import ModelError
from evospec.engine.speculation.drafters.head import read_token_counts, static_vocabulary
from tests.running_command import run_evospec
from tests.tiny_models import VOCAB_SIZE, make_directory, tiny_tokenizer

counts = st.lists(st.integers(0, 2**40), min_size=8, max_size=8).filter(any).map(torch.tensor)


@pytest.fixture
def drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shipped drafts would be; empty."""
    monkeypatch.setattr(count_text, "DRAFTS", tmp_path / "drafts")
    return tmp_path / "drafts"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_directory(tmp_path / "tiny").path)


def write_text(directory: Path, **files: bytes) -> Path:
    (directory / "deeper").mkdir(parents=True)
    for name, content in files.items():
        (directory / "deeper" / f"{name}.txt").write_bytes(content)
    return directory


def test_mixture_keeps_the_share_of_each() -> None:
    answers, text = torch.tensor([6, 2, 0, 0, 0]), torch.tensor([0, 10, 60, 30, 0])
    mixture = count_text.mixed(answers, text, 0.25).double()
    expected = [0.75 * 0.75, 0.75 * 0.25 + 0.25 * 0.1, 0.25 * 0.6, 0.25 * 0.3, 0.0]
    assert (mixture / mixture.sum()).tolist() == pytest.approx(expected)


@given(answers=counts, text=counts, share=st.floats(0.001, 0.999))
def test_mixture_is_between_its_parts(answers: torch.Tensor, text: torch.Tensor, share: float) -> None:
    """A token that both have seen more often than another comes before it, and what neither has seen stays unseen."""
    mixture = count_text.mixed(answers, text, share)
    assert mixture.dtype == torch.int64
    assert mixture[(answers == 0) & (text == 0)].eq(0).all()
    more = (answers[:, None] >= answers) & (text[:, None] >= text)
    assert (mixture[:, None] >= mixture)[more].all()


def test_a_token_seen_once_in_much_text_is_counted() -> None:
    text = torch.tensor([10**10, 1, 0])
    assert count_text.mixed(torch.tensor([5, 0, 0]), text, 0.01)[1:].tolist() == [1, 0]


def test_text_is_mixed_into_the_shipped_counts(model: str, drafts: Path, tmp_path: Path) -> None:
    """Answers decide what is first; of what they never had, what the text has comes before the rest."""
    [word] = tiny_tokenizer().encode("fox").ids[-1:]
    shipped = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    shipped[400:403] = torch.tensor([50, 40, 30])
    write_counts(shipped, drafts / "tiny")
    text = write_text(tmp_path / "text", one=b"fox " * 50_000, two="東京".encode())
    count_text.main(model, text, share=0.1)
    mixture = read_token_counts(drafts / "tiny", VOCAB_SIZE)
    assert static_vocabulary(mixture, 3, always=()).tolist() == [400, 401, 402]
    assert mixture[word] > mixture[tiny_tokenizer().encode("東京").ids].max() > 0


def test_counts_of_another_model_are_refused(model: str, tmp_path: Path) -> None:
    """And left as they are."""
    other = torch.ones(VOCAB_SIZE + 1, dtype=torch.int64)
    write_counts(other, tmp_path / "draft")
    with pytest.raises(ModelError, match="the model has 512"):
        count_text.main(model, write_text(tmp_path / "text", one=b"fox"), draft=tmp_path / "draft")
    assert read_token_counts(tmp_path / "draft", VOCAB_SIZE + 1).equal(other)


def test_text_alone_where_there_are_no_counts(model: str, drafts: Path, tmp_path: Path) -> None:
    """As many tokens as the text has, though it is counted in pieces."""
    count_text.main(model, write_text(tmp_path / "text", one=b"The dog sleeps.\n" * 20_000))
    made = read_token_counts(drafts / "tiny", VOCAB_SIZE)
    assert int(made.sum()) == 20_000 * len(tiny_tokenizer().encode("The dog sleeps.\n").ids)


def test_what_is_no_text_is_left_out_and_named(
    model: str, drafts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of such a file: what precedes its first wrong byte counts neither."""
    text = write_text(tmp_path / "text", picture=b"fox " * 50_000 + b"\xff\xfe", words=b"dog")
    count_text.main(model, text)
    assert int(read_token_counts(drafts / "tiny", VOCAB_SIZE).sum()) == len(tiny_tokenizer().encode("dog").ids)
    assert "picture.txt" in (said := capsys.readouterr().err)
    assert "words.txt" not in said


@pytest.mark.parametrize("files", [{}, {"empty": b""}, {"picture": b"\xff"}])
def test_a_directory_without_text(model: str, drafts: Path, tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ModelError, match="no text"):
        count_text.main(model, write_text(tmp_path / "text", **files))
    assert not drafts.exists()


def test_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evospec(monkeypatch, "vocab", "add-text", "no-such-model", str(tmp_path)) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "'no-such-model' is neither" in printed.err
