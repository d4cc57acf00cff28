"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

import msgspec

from evospec.engine.messages import TokenLogprob
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.schemas.chat import ChatLogprobs, ContentLogprob, TopLogprob
from evospec.server.schemas.completions import CompletionLogprobs

# JSON has no infinity; this is what OpenAI reports for probability 0.
MIN_LOGPROB = -9999.0
_PIECE = msgspec.msgpack.Decoder(list[TokenLogprob])


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    """``choices[].logprobs`` of chat completions."""
    return ChatLogprobs([_content_logprob(tokenizer, entry) for entry in entries])


def _content_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> ContentLogprob:
    chosen = _top_logprob(tokenizer, entry.token_id, entry.logprob)
    alternatives = [_top_logprob(tokenizer, token_id, logprob) for token_id, logprob in entry.top]
    return ContentLogprob(chosen.token, chosen.logprob, chosen.bytes, alternatives, entry.source)


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    text = _visible_bytes(tokenizer, token_id).decode(errors="replace")
    return TopLogprob(text, _finite(logprob), list(data) if data else None)


class CompletionLogprobsFormatter:
    """``choices[].logprobs`` of completions, piece by piece. Offsets count characters of the choice's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def push_prompt(self, token_ids: Sequence[int], pieces: Sequence[bytes], text: str | None) -> CompletionLogprobs:
        """The echoed prompt: its first token follows nothing and has no probability.

        ``pieces``: of the others, as in ``EngineOutput``. ``text``: what the client sent and gets back, special tokens
        written out; None for a prompt of token ids.
        """
        offsets = self._prompt_offsets(token_ids, text)  # of all
        first = CompletionLogprobs([self._name(token_ids[0])], [None], [None], offsets)
        return join_logprobs([first, *(self._rows(entries, []) for entries in map(_PIECE.decode, pieces))])

    def push(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Further tokens."""
        return self._rows(entries, [self._advance(entry.token_id) for entry in entries])

    def _rows(self, entries: Sequence[TokenLogprob], offsets: list[int]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._name(entry.token_id) for entry in entries],
            token_logprobs=[_finite(entry.logprob) for entry in entries],
            top_logprobs=[self._top(entry) for entry in entries],
            text_offset=offsets,
        )

    def _prompt_offsets(self, token_ids: Sequence[int], text: str | None) -> list[int]:
        """Where the prompt's tokens start.

        Tokenizers of SentencePiece put a space in front of a text, and of what follows a special token in it. It is in
        the first token, or the second where the text begins with a space, but not in the text.
        """
        shown = self._tokenizer.decode(token_ids) if text is None else text
        offsets, may_have_space = [], True
        for token_id in token_ids:
            offset = self._advance(token_id, text)
            data = self._tokenizer.token_bytes(token_id)
            if may_have_space and _has_added_space(data, shown, offset):
                self._offset -= 1
                may_have_space = False
            may_have_space |= not data
            offsets.append(offset)
        return offsets

    def _advance(self, token_id: int, prompt: str | None = None) -> int:
        """Where the token's text starts; a special token has one only where ``prompt`` has it written out."""
        offset = self._offset
        data = self._tokenizer.token_bytes(token_id)
        self._offset += len(self._decoder.decode(data))
        if prompt and not data:
            name = _visible_bytes(self._tokenizer, token_id).decode(errors="replace")
            # Not so the BOS that the tokenizer itself put in front.
            self._offset += len(name) if prompt.startswith(name, offset) else 0
        return offset

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives and the chosen token itself."""
        top = {self._name(token_id): _finite(logprob) for token_id, logprob in entry.top}
        return {**top, self._name(entry.token_id): _finite(entry.logprob)}

    def _name(self, token_id: int) -> str:
        data = _visible_bytes(self._tokenizer, token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def join_logprobs(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Pieces of a choice, joined."""
    joined = CompletionLogprobs([], [], [], [])
    for piece in pieces:
        joined.tokens.extend(piece.tokens)
        joined.token_logprobs.extend(piece.token_logprobs)
        joined.top_logprobs.extend(piece.top_logprobs)
        joined.text_offset.extend(piece.text_offset)
    return joined


def _visible_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """A token's bytes; the name of a special token, which has no text."""
    return tokenizer.token_bytes(token_id) or (tokenizer.id_to_token(token_id) or "").encode()


def _has_added_space(token: bytes, prompt: str, offset: int) -> bool:
    """Whether the prompt goes on at ``offset`` with the token's text but for a space in front of it."""
    text = token.decode(errors="ignore")
    return text.startswith(" ") and not prompt.startswith(text, offset) and prompt.startswith(text[1:], offset)


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
