"""/tokenize, /detokenize and /tokenizer_info, in the shapes vLLM uses."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.schemas.body import Body
from server.schemas.chat import MAX_MESSAGES, Message, TemplateVariables, few_parts
from server.schemas.fields import TokenId


class TokenizeRequest(Body):
    """Exactly one of ``prompt`` and ``messages`` (rendered with the chat template)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, BeforeValidator(few_parts)] = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="Begin-of-sequence token and the like; default true for prompt. Not for messages."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "exactly one of prompt and messages is required", {"param": "prompt"})
        if self.messages is not None and self.add_special_tokens is not None:
            raise PydanticCustomError(
                "add_special_tokens",
                "applies to prompt; the chat template decides for messages",
                {"param": "add_special_tokens"},
            )
        return self


class TokenizeResponse(msgspec.Struct, frozen=True):
    """``count`` is the length of ``tokens``."""

    tokens: list[int]
    count: int
    max_model_len: int


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens by name that begin and end texts, and the chat template (Jinja); None for what the model has not."""

    bos_token: str | None
    eos_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class DetokenizeRequest(Body):
    """Token ids to turn into text; special tokens are kept."""

    model: str | None = None
    tokens: list[TokenId] = Field(max_length=2**17, fail_fast=True)


class DetokenizeResponse(msgspec.Struct, frozen=True):
    """The text of the tokens."""

    prompt: str
