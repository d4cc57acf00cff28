"""A ``tokenizers.Tokenizer`` from the metadata of a GGUF file (byte-level BPE only)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from engine.models.config import ModelError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_CONTRACTIONS_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> PreTokenizer:
    pattern = Regex(_CONTRACTIONS_WORDS + digits + _PUNCTUATION_SPACES)
    return Sequence([Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "qwen2": lambda: _split(r"\p{N}"),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
}


def gguf_backend(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that the metadata describes.

    Raises:
        ModelError: not byte-level BPE, an unknown pre-tokenizer, or missing or inconsistent entries.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ModelError(f"tokenizer {kind!r} is not supported in GGUF files (supported: 'gpt2', byte-level BPE)")
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(f"pre-tokenizer {pre!r} is not supported (supported: {', '.join(_PRE_TOKENIZERS)})")
    tokens, types = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    if not tokens or len(tokens) != len(types):
        raise ModelError(f"{len(tokens)} tokens with {len(types)} token types")
    backend = Tokenizer(_bpe(metadata, tokens, types, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = ByteLevelDecoder()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    _prepend_bos(backend, metadata, default=pre == "llama-bpe")
    return backend


def _bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], ignore_merges: bool) -> BPE:
    vocab = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    try:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
        return BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception for a merge of unknown tokens
        raise ModelError(f"inconsistent BPE merges: {error}") from error


def _prepend_bos(backend: Tokenizer, metadata: Mapping[str, Any], default: bool) -> None:
    if not metadata.get("tokenizer.ggml.add_bos_token", default):
        return
    index = metadata.get("tokenizer.ggml.bos_token_id")
    token = backend.id_to_token(index) if isinstance(index, int) else None
    if token is None:
        raise ModelError("the tokenizer wants a BOS token but names none")
    # NOTE: the template's own syntax splits at spaces and colons, so the token is referred to by a fixed name.
    backend.post_processor = TemplateProcessing(
        single=["bos", "$A"],
        pair=["bos", "$A", "$B"],
        special_tokens=[{"id": "bos", "ids": [index], "tokens": [token]}],
    )
