"""The raw bytes each token stands for."""

from __future__ import annotations

import json
import re

import tokenizers

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_byte_table(backend: tokenizers.Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of every id below ``vocab_size``; empty for special tokens and ids without a token.

    Knows byte-level BPE (GPT-2) and SentencePiece's chunks with byte fallback.
    """
    added = backend.get_added_tokens_decoder()
    byte_level = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    table = [b""] * vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size:
            continue
        if index in added:
            table[index] = b"" if added[index].special else token.encode()
        else:
            table[index] = _byte_level_bytes(token) if byte_level else _sentencepiece_bytes(token)
    return table


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF_CHAR[char] for char in token) if _BYTE_OF_CHAR.keys() >= set(token) else token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the other bytes follow from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()
