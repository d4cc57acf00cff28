"""Text to token ids and back, and the model's chat template. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers

from evospec.engine.models.config import ModelError, ModelFiles
from evospec.engine.models.gguf_file import GGUFFile
from evospec.engine.models.gguf_spec import spec_from_gguf
from evospec.engine.models.safetensors_spec import read_config, read_json
from evospec.engine.text.chat_template import ChatTemplate, ChatTemplateError
from evospec.engine.text.gguf_tokenizer import gguf_backend
from evospec.engine.text.token_bounds import LeastTokens

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_GAP_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)
"""To fill a gap: before what precedes the gap, before what follows it, and before what is missing."""
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF_CHAR = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}
"""GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the other bytes follow from U+0100."""
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Encodes and decodes text with the ``tokenizers`` library.

    ``vocab_size`` is the model's number of rows; it may exceed the number of tokens.
    ``eos_token_ids`` end a generation. ``special_token_ids`` have no text.
    ``least_tokens(text)``: how many tokens a text has at least. ``chat_template``: None if the model has none.
    ``named_tokens``: ``bos_token``, ``eos_token`` and the like by these names, as far as there are any; given are those
    that the model's files name, None for those that it does without, and the others go by their ids.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        vocab_size: int,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
        named_tokens: Mapping[str, str | None] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        self._token_bytes = _token_byte_table(backend, vocab_size)
        self.least_tokens = LeastTokens(backend, self._token_bytes)
        by_id = {"bos_token": bos_token_id, "eos_token": next(iter(eos_token_ids), None)}
        names = {name: None if index is None else self.id_to_token(index) for name, index in by_id.items()}
        names |= named_tokens or {}
        self.named_tokens = {name: token for name, token in names.items() if token is not None}
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, self.named_tokens)

    @classmethod
    def from_files(cls, files: ModelFiles) -> Tokenizer:
        """The tokenizer of a model; ``ModelError`` if it is missing, corrupt or not supported."""
        try:
            return _from_gguf(files.path) if files.format == "gguf" else _from_directory(files.path)
        except ChatTemplateError as error:
            raise ModelError(f"{files.path}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written out in it become their ids.

        Bytes without a token vanish, as everywhere with such vocabularies: SmolLM2 has none for six
        control characters, so a text of nothing else encodes to nothing.

        ``add_special_tokens``: put BOS in front, where the model wants that.

        Raises:
            ValueError: ``text`` holds half of a surrogate pair, so it is no Unicode text.
        """
        try:
            text.encode()  # the library would call such a string no string at all
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error}") from error
        # encode() keeps the GIL, seconds for a text of megabytes; encode_batch() lets other threads go on.
        return self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD. Other threads go on meanwhile."""
        # The library's ``decode`` keeps the GIL, tenths of a second for a long text.
        return self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for special tokens and ids without a token."""
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it (byte-level: ``Ġ`` for a space); None if there is none."""
        return self.backend.id_to_token(token_id)

    def fingerprint(self) -> str:
        """32 hexadecimal digits, the same for models whose ids stand for the same tokens; snapshots carry it."""
        digest = blake2b(digest_size=16)
        for token_id in range(self.vocab_size):
            token = (self.id_to_token(token_id) or "").encode()
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        ``variables``: what else the template is told, as ``chat_template_kwargs`` of ``transformers``.

        Raises:
            ChatTemplateError: no template, or it cannot render these messages.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        return self.chat_template.render(messages, add_generation_prompt, tools, variables or {})

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation up to its next answer; of a model without a chat template, of its texts alone."""
        if self.chat_template is None:
            return self.encode("".join(f"{message['content']}\n\n" for message in messages))
        return self.encode(self.apply_chat_template(messages), add_special_tokens=False)

    def fill_in_prompt(self, before: str, after: str) -> str | None:
        """The prompt that asks for what is between two texts; None where the model has no tokens that say so."""
        for first, second, third in _GAP_MARKS:
            if all(self.backend.token_to_id(mark) is not None for mark in (first, second, third)):
                return first + before + second + after + third
        return None


def _from_gguf(path: Path) -> Tokenizer:
    file = GGUFFile(path)
    spec = spec_from_gguf(file)
    try:
        backend = gguf_backend(file)
        template = file.get("tokenizer.chat_template", str)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return Tokenizer(backend, spec.vocab_size, spec.bos_token_id, spec.eos_token_ids, template)


def _from_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file (tokenizers in other formats are not supported)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: cannot be read: {error}") from error
    spec, _ = read_config(directory)
    path, file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else _chat_template(config)
        names = _named_tokens(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    return Tokenizer(backend, spec.vocab_size, spec.bos_token_id, spec.eos_token_ids, template, names)


def _chat_template(config: Mapping[str, Any]) -> str | None:
    """The entry of ``tokenizer_config.json``: a template, or several with names."""
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ModelError("chat_template must be a string or a list of named templates")
    return template


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The entries of ``tokenizer_config.json``: null, a token, or an object with the token as its content."""
    entries = {name: config[name] for name in _NAMED_TOKENS if name in config}
    tokens = {name: entry.get("content") if isinstance(entry, Mapping) else entry for name, entry in entries.items()}
    for name, token in tokens.items():
        if token is not None and not isinstance(token, str):
            raise ModelError(f"{name} is {token!r:.40}, must be a string")
    return tokens


def _token_byte_table(backend: tokenizers.Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of every id below ``vocab_size``; empty for special tokens and ids without a token.

    Knows byte-level BPE (GPT-2) and SentencePiece's chunks with byte fallback.
    """
    added = backend.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(backend.decoder)
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
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
