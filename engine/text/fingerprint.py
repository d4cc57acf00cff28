"""The name of a model's tokens, by which snapshots of sessions are told apart."""

from __future__ import annotations

from hashlib import blake2b

from engine.text.tokenizer import Tokenizer


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits: the same for models whose ids stand for the same tokens."""
    digest = blake2b(digest_size=16)
    for token_id in range(tokenizer.vocab_size):
        token = (tokenizer.id_to_token(token_id) or "").encode()
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()
