"""A ``tokenizers.Tokenizer`` from the metadata of a GGUF file: byte-level BPE, or that of SentencePiece."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from evospec.engine.models.config import ModelError
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.gguf_spec import CONTROL_TOKEN

_NORMAL_TOKEN, _USER_DEFINED_TOKEN, _UNUSED_TOKEN = 1, 4, 5
_SPACE = "▁"
_KEEP_SPACE_IN_PHI3 = {"<unk>", "<s>", "<|endoftext|>"}
"""Phi-3's other tokens that are found as they are written take the white space after them, which no GGUF file says."""
_CONTRACTIONS_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": lambda: Sequence([Digits(individual_digits=True), _gpt2()]),
    "qwen2": lambda: _split(_CONTRACTIONS_WORDS + r"\p{N}" + _PUNCTUATION_SPACES),
    "llama-bpe": lambda: _split(_CONTRACTIONS_WORDS + r"\p{N}{1,3}" + _PUNCTUATION_SPACES),
    "gpt-4o": lambda: _split(_GPT_4O),
}


def gguf_backend(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer that the file's metadata describes.

    Raises:
        ModelError: a tokenizer or pre-tokenizer that is not supported, or missing or inconsistent entries.
    """
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str) or "default"
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer {kind!r} is not supported in GGUF files (supported: gpt2, llama)")
    tokens = file.get_list("tokenizer.ggml.tokens", str)
    types = file.get_list("tokenizer.ggml.token_type", int)
    if not tokens or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise ModelError(f"{len(tokens)} tokens ({len(set(tokens))} different) with {len(types)} token types")
    backend = _sentencepiece(file, tokens, types) if kind == "llama" else _byte_level(file, pre, tokens, types)
    backend.add_special_tokens(_added(file, tokens, types, CONTROL_TOKEN))
    backend.add_tokens(_added(file, tokens, types, _USER_DEFINED_TOKEN))
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool)
    if add_bos if add_bos is not None else kind == "llama" or pre == "llama-bpe":
        bos = file.require("tokenizer.ggml.bos_token_id", int)
        if backend.id_to_token(bos) is None:
            raise ModelError(f"the BOS token {bos} does not exist")
        backend.post_processor = TemplateProcessing(single="bos $A", special_tokens=[("bos", bos)])
    return backend


def _added(file: GGUFFile, tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    """The tokens of a kind that are found in a text before anything else."""
    is_phi3 = file.get("general.architecture", str) == "phi3"
    added = [token for token, its_kind in zip(tokens, types, strict=True) if its_kind == kind]
    return [AddedToken(token, normalized=False, rstrip=is_phi3 and token not in _KEEP_SPACE_IN_PHI3) for token in added]


def _byte_level(file: GGUFFile, pre: str, tokens: list[str], types: list[int]) -> Tokenizer:
    """Without its special tokens."""
    if pre not in _PRE_TOKENIZERS:
        raise ModelError(f"pre-tokenizer {pre!r} is not supported (supported: {', '.join(_PRE_TOKENIZERS)})")
    # Unused tokens only fill the vocabulary up to the model's size.
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED_TOKEN}
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in file.get_list("tokenizer.ggml.merges", str))
    ]
    try:
        backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in ("llama-bpe", "gpt-4o")))
    except Exception as error:  # the library raises bare Exception for a merge of unknown tokens
        raise ModelError(f"inconsistent BPE merges: {error}") from error
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Without its special tokens.

    SentencePiece merges, again and again, the two neighbours whose union has the highest score; the library merges
    those whose pair comes first in a list. So every pair of tokens whose union is a token is listed, by the union's
    score.
    """
    scores = file.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ModelError(f"{len(tokens)} tokens with {len(scores)} scores")
    unknown = file.get("tokenizer.ggml.unknown_token_id", int) or 0
    if not 0 <= unknown < len(tokens):
        raise ModelError(f"the unknown token {unknown} does not exist")
    normal = {token: scores[index] for index, token in enumerate(tokens) if types[index] == _NORMAL_TOKEN}
    backend = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens) if types[index] != _UNUSED_TOKEN},
            merges=_merges(normal),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool) is False:
        backend.normalizer, backend.decoder = spaces, decoders.Sequence(text)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        backend.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)])
    return backend


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of tokens whose union is one, that with the highest score first."""
    pairs = [
        (-score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
