"""Text to tokens and back: against llama.cpp's and transformers' tokenizers; chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.text.gguf_tokenizer import gguf_backend
from evospec.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_directory, make_gguf

# Ids by llama.cpp (llama-cpp-py-sync 0.11739) from the same file.
LLAMA_CPP_IDS = [
    ("I'm you're WE'LL don't", [57, 5248, 346, 2316, 26587, 23, 16421, 1326, 982]),
    ("12345 1 23 456,789", [33, 34, 35, 36, 37, 216, 33, 216, 34, 35, 216, 36, 37, 38, 28, 39, 40, 41]),
    ("½ ² ٣ Ⅷ", [16738, 216, 19133, 216, 164, 113, 216, 173, 223, 117]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("👩‍🚀🎉 emoji", [10813, 235, 119, 321, 231, 10813, 244, 218, 10813, 232, 227, 649, 33777]),
    ("def f(x):\n    return x**2  #\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 198]),
    ("東京都 日本語", [30679, 126, 16736, 122, 180, 38466, 17097, 241, 115, 40993, 179, 120, 248]),
]
TEXTS = st.text(max_size=60) | st.text(alphabet="ab Z 019½'’.,!\n\t\r  (){}é東👩\u200d🚀_#", max_size=80)
# Its vocabulary has no token for these bytes, and none that holds them.
SMOLLM2_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>1 & 2</b>?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Sure? 東京"},
]
NO_SHARED_STATE = [HealthCheck.function_scoped_fixture]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_files(ModelFiles("smollm2", smollm2_path, "gguf"))


@pytest.fixture(scope="module")
def smollm2_file(smollm2_path: Path) -> GGUFFile:
    return GGUFFile(smollm2_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """One model, stored both ways."""
    path = tmp_path_factory.mktemp("models")
    directory = make_directory(path / "tiny")
    return {"safetensors": directory, "gguf": make_gguf(path / "tiny.gguf", directory.path)}


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny: dict[str, ModelFiles]) -> Tokenizer:
    return Tokenizer.from_files(tiny["gguf"])


def with_metadata(file: GGUFFile, **changes: Any) -> GGUFFile:
    """The same file with other tokenizer metadata."""
    changed = GGUFFile(file.path)
    changed.metadata.update({f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    return changed


@pytest.fixture(scope="module")
def qwen2_pair(smollm2_file: GGUFFile) -> tuple[Backend, Qwen2Tokenizer]:
    """Ours and that of ``transformers``, which has its own Qwen2 tokenizer, with one vocabulary."""
    ours = gguf_backend(with_metadata(smollm2_file, pre="qwen2"))
    model = json.loads(ours.to_str())["model"]
    merges: list[Any] = [tuple(merge) for merge in model["merges"]]  # pairs, which its own annotation leaves out
    return ours, Qwen2Tokenizer(vocab=model["vocab"], merges=merges)


@pytest.fixture(scope="module")
def llama3(smollm2_file: GGUFFile) -> Backend:
    return gguf_backend(with_metadata(smollm2_file, pre="llama-bpe", add_bos_token=False))


@pytest.fixture(scope="module")
def gpt_oss(smollm2_file: GGUFFile) -> Backend:
    return gguf_backend(with_metadata(smollm2_file, pre="gpt-4o"))


@pytest.mark.parametrize(("text", "token_ids"), LLAMA_CPP_IDS)
def test_smollm2_ids_are_those_of_llama_cpp(smollm2: Tokenizer, text: str, token_ids: list[int]) -> None:
    assert smollm2.encode(text) == token_ids
    assert smollm2.decode(token_ids, skip_special_tokens=False) == text


@settings(max_examples=300, suppress_health_check=NO_SHARED_STATE)
@given(text=TEXTS)
def test_any_text_survives(smollm2: Tokenizer, tiny_tokenizer: Tokenizer, text: str) -> None:
    for tokenizer in (smollm2, tiny_tokenizer):
        token_ids = tokenizer.encode(text)
        known = bytes(byte for byte in text.encode() if not (tokenizer is smollm2 and byte in SMOLLM2_LACKS))
        assert b"".join(map(tokenizer.token_bytes, token_ids)) == known
        assert tokenizer.decode(token_ids) == known.decode(errors="replace")


@settings(max_examples=300, suppress_health_check=NO_SHARED_STATE)
@given(token_ids=st.lists(st.integers(0, 511), max_size=12))
def test_token_bytes_spell_what_decode_says(tiny_tokenizer: Tokenizer, token_ids: list[int]) -> None:
    joined = b"".join(map(tiny_tokenizer.token_bytes, token_ids))
    assert joined.decode(errors="replace") == tiny_tokenizer.decode(token_ids)


@settings(max_examples=300, suppress_health_check=NO_SHARED_STATE)
@given(text=TEXTS)
def test_qwen2_pre_tokenizer_is_that_of_transformers(qwen2_pair: tuple[Backend, Qwen2Tokenizer], text: str) -> None:
    ours, theirs = qwen2_pair
    assert ours.encode(text).ids == theirs.encode(text)


@settings(max_examples=300, suppress_health_check=NO_SHARED_STATE)
@given(text=TEXTS)
def test_llama3_pre_tokenizer_splits_as_transformers_does(llama3: Backend, text: str) -> None:
    """``transformers`` converts tiktoken files with Llama 3's pattern unless told otherwise."""
    converter = TikTokenConverter()  # type: ignore[no-untyped-call]
    theirs = Split(Regex(converter.pattern), "isolated")
    words = [text[start:end] for _, (start, end) in llama3.pre_tokenizer.pre_tokenize_str(text)]
    assert words == [word for word, _ in theirs.pre_tokenize_str(text)]


@settings(max_examples=300, suppress_health_check=NO_SHARED_STATE)
@given(text=TEXTS)
def test_gpt_4o_pre_tokenizer_splits_as_transformers_does(gpt_oss: Backend, text: str) -> None:
    theirs = Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]), "isolated")
    words = [text[start:end] for _, (start, end) in gpt_oss.pre_tokenizer.pre_tokenize_str(text)]
    assert words == [word for word, _ in theirs.pre_tokenize_str(text)]


def test_bos_is_put_in_front_where_the_file_says_so(smollm2_file: GGUFFile) -> None:
    backend = gguf_backend(with_metadata(smollm2_file, add_bos_token=True, bos_token_id=1))
    assert backend.encode("Hello").ids == [1, 19556]
    assert backend.encode("Hello", add_special_tokens=False).ids == [19556]
    assert gguf_backend(smollm2_file).encode("Hello").ids == [19556]


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_tokens_of_phi3_take_the_white_space_after_them(family: str, tmp_path: Path) -> None:
    """As its tokenizer.json says, and llama.cpp has it, but for <|endoftext|>."""
    directory = make_directory(tmp_path / "model", family)
    files, path = make_gguf(tmp_path / "model.gguf", directory.path), tmp_path / "model" / "tokenizer.json"
    stored = json.loads(path.read_text())
    for token in stored["added_tokens"]:
        token["rstrip"] = family == "phi3" and token["content"] != "<|endoftext|>"
    path.write_text(json.dumps(stored))
    gguf, reference = Tokenizer.from_files(files), Backend.from_file(str(path))
    for text in ("<|im_start|>\nhi<|im_end|> \n <|im_start|>", "<|endoftext|>\nhi<|im_end|>" + " " * 5000):
        ids = gguf.encode(text)
        assert ids == reference.encode(text).ids
        assert gguf.least_tokens(text) <= len(ids)


def test_directory_and_gguf_of_one_model_agree(tiny: dict[str, ModelFiles]) -> None:
    directory, gguf = (Tokenizer.from_files(tiny[kind]) for kind in ("safetensors", "gguf"))
    text = "The fox said:<|im_end|>\n  naïve 東京 123<|endoftext|>"
    assert directory.encode(text) == gguf.encode(text)
    assert directory.vocab_size == gguf.vocab_size == 512
    assert directory.special_token_ids == gguf.special_token_ids == {0, 1, 2}
    assert set(directory.eos_token_ids) == set(gguf.eos_token_ids) == {0, 2}
    assert directory.apply_chat_template(CHAT) == gguf.apply_chat_template(CHAT)


def test_special_and_absent_tokens_have_no_text(tiny: dict[str, ModelFiles]) -> None:
    tokenizer = Tokenizer.from_files(tiny["gguf"])
    for token_id in (0, 2, 511, 512, 10**9, -1):
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([0, 2, 511]) == ""
    assert tokenizer.decode([0, 2], skip_special_tokens=False) == "<|endoftext|><|im_end|>"
    assert (tokenizer.id_to_token(2), tokenizer.id_to_token(511)) == ("<|im_end|>", None)


def test_sentencepiece_pieces_are_spelled_out(tmp_path: Path) -> None:
    """The other kind of tokenizer that llama directories come with."""
    vocab = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁caf": 3, "é": 4}
    backend = Backend(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>"])
    files = make_directory(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_files(files)
    assert [tokenizer.token_bytes(token_id) for token_id in range(5)] == [b"", b"\xc3", b"\xa9", b" caf", "é".encode()]
    assert tokenizer.decode([3, 1, 2]) == " café"


def test_half_a_surrogate_pair_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        smollm2.encode("broken \ud83d")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "rwkv"}, "tokenizer 'rwkv' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"tokens": ["a", "b"]}, "2 tokens"),
        ({"token_type": 3}, "must be an array of type int"),
        ({"merges": ["no such"]}, "inconsistent BPE merges"),
        ({"add_bos_token": True, "bos_token_id": 10**9}, "BOS token 1000000000 does not exist"),
    ],
)
def test_unsupported_gguf_tokenizer_is_named(smollm2_file: GGUFFile, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        gguf_backend(with_metadata(smollm2_file, **changes))


def test_unreadable_tokenizer_json_is_refused(tmp_path: Path) -> None:
    files = make_directory(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_files(files)
    path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_files(files)


def test_texts_are_neither_cut_nor_filled_up(tiny: dict[str, ModelFiles], tmp_path: Path) -> None:
    """A tokenizer.json may hold what its tokenizer was last told, which counts for nothing in transformers either."""
    files = make_directory(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(max_length=16)
    backend.enable_padding(length=12, pad_id=0)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, plain = Tokenizer.from_files(files), Tokenizer.from_files(tiny["safetensors"])
    for text in ("a", "The quick brown fox jumps over the lazy dog. " * 20):
        assert tokenizer.encode(text) == plain.encode(text)
