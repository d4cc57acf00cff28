"""SentencePiece's BPE from the metadata of a GGUF file, as a model of the ``tokenizers`` library.

SentencePiece merges, again and again, the two neighbours whose union has the highest score; the library merges those
whose pair comes first in a list. So every pair of tokens whose union is a token is listed, by the union's score.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Decoder, Fuse, Replace, Strip
from tokenizers.decoders import Sequence as DecoderSequence
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer, Prepend
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.normalizers import Sequence as NormalizerSequence

from engine.models.config import ModelError
from engine.models.gguf_file import GGUFFile

_NORMAL_TOKEN, _UNUSED_TOKEN = 1, 5
_SPACE = "▁"


def sentencepiece_backend(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """The tokenizer without its special tokens.

    Raises:
        ModelError: there is not one score for each token, or no token for an unknown character.
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
    add_prefix = file.get("tokenizer.ggml.add_space_prefix", bool)
    backend.normalizer = _normalizer(add_prefix is not False)
    backend.decoder = _decoder(add_prefix is not False)
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


def _normalizer(add_prefix: bool) -> Normalizer:
    spaces = ReplaceText(" ", _SPACE)
    return NormalizerSequence([Prepend(_SPACE), spaces]) if add_prefix else spaces


def _decoder(add_prefix: bool) -> Decoder:
    steps = [Replace(_SPACE, " "), ByteFallback(), Fuse()]
    return DecoderSequence([*steps, Strip(" ", 1, 0)] if add_prefix else steps)
