"""SentencePiece's BPE of GGUF files, against its definition: neighbours with the best union are merged first."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.models.config import ModelError
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.text.gguf_tokenizer import gguf_backend

CONTROL, USER_DEFINED, NORMAL, BYTE = 3, 4, 1, 6
SPECIAL = {"<unk>": CONTROL, "<s>": CONTROL, "</s>": CONTROL, "\n\n": USER_DEFINED, "  ": USER_DEFINED}
PIECES = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁a",
    "an",
    "ab",
    "ba",
    "aba",
    "bab",
    "the",
    "ing",
    "▁▁",
    "nn",
    "nan",
    "banana",
    "ana",
]
CHARACTERS = list("▁abeghint")
BYTES = [f"<0x{value:02X}>" for value in range(256)]
TOKENS = [*SPECIAL, *BYTES, *PIECES, *CHARACTERS]
SCORES = {token: -float(index) for index, token in enumerate([*PIECES, *CHARACTERS])}


def make_file(path: Path, scores: int = len(TOKENS), add_space_prefix: bool = False) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([SCORES.get(token, 0.0) for token in TOKENS][:scores])
    writer.add_token_types([SPECIAL.get(token, BYTE if token in BYTES else NORMAL) for token in TOKENS])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_space_prefix(add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


def by_definition(text: str) -> list[str]:
    """Of a text without special tokens."""
    parts = list(text.replace(" ", "▁"))
    while True:
        unions = [(SCORES.get(left + right), -at) for at, (left, right) in enumerate(pairwise(parts))]
        best = max(((score, at) for score, at in unions if score is not None), default=None)
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    bytes_of = {part: [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts}
    return [token for part in parts for token in ([part] if part in TOKENS else bytes_of[part])]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return make_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@given(text=st.text(alphabet="abeghint é東", max_size=30).filter(lambda text: "  " not in text))
def test_merges_by_score(file: GGUFFile, text: str) -> None:
    backend = gguf_backend(file)
    assert backend.encode(text, add_special_tokens=False).tokens == by_definition(text)
    assert backend.decode(backend.encode(text).ids) == text


def test_special_tokens_are_found_in_the_text_as_it_is(file: GGUFFile) -> None:
    encoded = gguf_backend(file).encode("a  the\n\nban</s>")
    assert [TOKENS[index] for index in encoded.ids] == ["<s>", "a", "  ", "the", "\n\n", "b", "an", "</s>"]


def test_a_space_in_front(tmp_path: Path) -> None:
    backend = gguf_backend(make_file(tmp_path / "prefixed.gguf", add_space_prefix=True))
    assert [TOKENS[index] for index in backend.encode("the").ids] == ["<s>", "▁the"]
    assert backend.decode(backend.encode("the ban").ids) == "the ban"


def test_scores_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{len(TOKENS)} tokens with 5 scores"):
        gguf_backend(make_file(tmp_path / "lacking.gguf", scores=5))
