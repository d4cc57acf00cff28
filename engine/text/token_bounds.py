"""How many tokens a text has at least, without tokenising it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

_PIECE = 1 << 16
"""Bytes counted at a time; each takes eight bytes of memory meanwhile."""
_KEEP_ALL = {"Sequence", "Split", "Digits", "ByteLevel"}
"""Pre-tokenizers that drop nothing of a text, unless they say "Removed"."""
_COMPOSED = 4
"""A text that is not in normal form has at least a fourth of the tokens that its normal form counts.

A special token in it stands as it is written, while in the normal form of the whole text its last character may have
taken up marks that follow: one character of at most three bytes, so three tokens, for each special token.
"""


class LeastTokens:
    """A lower bound for byte-level BPE: a byte is part of no token longer than the longest one that has this byte.

    So a text has at least the sum, over its bytes, of the reciprocal of that length. A byte that is no token of its own
    may be dropped by the tokenizer and counts nothing.

    Args:
        backend: for a tokenizer of another kind, or with a normaliser other than NFC, the bound is only the characters
            divided by the longest token. White space does not count there, since special tokens may take it with them.
        token_bytes: what each token that is not special stands for.
    """

    def __init__(self, backend: tokenizers.Tokenizer, token_bytes: Sequence[bytes]) -> None:
        added = backend.get_added_tokens_decoder().values()
        tokens = {*token_bytes, *(token.content.encode() for token in added)}
        self._longest = max(map(len, tokens))
        self._is_sharp = _is_byte_level_bpe(backend) and not any(token.lstrip or token.rstrip for token in added)
        self._normalizer = backend.normalizer
        """Not Python's ``unicodedata``, which sorts the marks of a character in quadratic time."""
        self._shares = np.zeros(256)
        by_length: dict[int, list[bytes]] = {}
        for token in tokens:
            by_length.setdefault(len(token), []).append(token)
        for length in sorted(by_length):  # so the longest has the last word
            for byte in set(b"".join(by_length[length])):
                if bytes([byte]) in tokens:
                    self._shares[byte] = 1 / length

    def __call__(self, text: str) -> int:
        """At most the number of tokens of ``text``."""
        if not self._is_sharp:
            return sum(map(len, text.split())) // self._longest
        normal = text if self._normalizer is None else self._normalizer.normalize_str(text)
        data = np.frombuffer(normal.encode(), np.uint8)
        chunks = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        least = float(sum(np.bincount(chunk, minlength=256) @ self._shares for chunk in chunks))
        least *= 1 - 1e-9  # rounding
        return int(least if normal == text else least / _COMPOSED)


def _is_byte_level_bpe(backend: tokenizers.Tokenizer) -> bool:
    """Whether every byte of a text, in normal form C if there is a normaliser, is in a token, or is none by itself."""
    if not isinstance(backend.model, BPE) or not isinstance(backend.normalizer, NFC | None):
        return False
    description = "" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__().decode()
    kinds = set(re.findall(r'"type":\s*"(\w+)"', description))
    return "ByteLevel" in kinds and kinds <= _KEEP_ALL and "Removed" not in description
