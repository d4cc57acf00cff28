"""/v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from evospec.server.schemas.answers import AnswerBody
from evospec.server.schemas.fields import SamplingFields, TokenId
from evospec.server.schemas.unsupported import OF_CHAT, UNSUPPORTED

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _say_what_a_prompt_is(value: Any) -> Any:
    """One clear error instead of one for each of the four forms."""
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else None
    if kinds == set() or (kinds == {list} and [] in value):
        raise PydanticCustomError("prompt", "must not be empty")
    if kinds not in ({str}, {int}, {list}):
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
        )
    if kinds != {int} and len(value) > MAX_PROMPTS:
        raise PydanticCustomError("too_long", f"must be at most {MAX_PROMPTS} at once, not {len(value)}")
    return value


Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    BeforeValidator(_say_what_a_prompt_is),
]
"""One or several prompts, as text or as token ids."""


class CompletionRequest(SamplingFields):
    """Continue one or several prompts: a string, token ids, or a list of either."""

    unsupported: ClassVar = UNSUPPORTED | OF_CHAT | {"add_special_tokens": [True]}

    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31, description="Default 16; 0 only with echo.")
    echo: bool | None = Field(default=None, description="Put the prompt in front of each completion.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives to report beside each token.")
    best_of: int | None = Field(default=None, description="Not supported; accepted where it equals n.")
    suffix: str | None = Field(default=None, description="What follows the gap that the completion fills.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "may be 0 only with echo", {"param": "max_tokens"})
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise PydanticCustomError("best_of", "not supported unless it equals n", {"param": "best_of"})
        if self.suffix and self.echo:
            raise PydanticCustomError("suffix", "not supported with echo", {"param": "suffix"})
        return self


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token. ``text_offset`` counts characters of ``text``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One completion, or a piece of it in a stream (then ``finish_reason`` is null until the last)."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class Completion(AnswerBody, frozen=True, kw_only=True):
    """Response of /v1/completions, whole or one event of the stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
