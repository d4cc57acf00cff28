"""Field types and the parameters that several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from evospec.engine.config import MAX_SPECULATIVE_TOKENS
from evospec.server.schemas.body import Harmless, LenientBody, at_most
from evospec.server.schemas.constraints import ConstraintFields
from evospec.server.schemas.unsupported import SYNONYMS, UNSUPPORTED
from evospec.server.session_ids import MAX_NAME_CHARS

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_METADATA = 16
MAX_CHOICES = 16
INT64 = 2**63


class StreamOptions(LenientBody):
    """``include_usage``: one more chunk, with usage and no choices, at the end."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far in every chunk.")
    include_obfuscation: Annotated[Any, Harmless(False)] = None


StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopList = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class CommonFields(LenientBody):
    """Parameters that every endpoint that generates has. null means the default everywhere; those of sampling are in
    /v1/models.

    ``user``, ``metadata``, ``safety_identifier`` and ``prompt_cache_key`` label a request and never change its output.
    Nor does a session.
    """

    unsupported, synonyms = UNSUPPORTED, SYNONYMS

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0: the most likely token only.")
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="0 or -1: off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Choice i of a prompt uses seed + i.")
    num_speculative_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SPECULATIVE_TOKENS,
        description="Most draft tokens a step, within the server's own limit; 0: no speculation. Speed only: the "
        "output is the same.",
    )
    stream: bool | None = None
    session_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_NAME_CHARS,
        description="From POST /v1/sessions, or any name; may also be sent as the header X-Session-Id. Speed only: the "
        "output is the same.",
    )
    user: str | None = Field(
        default=None, max_length=MAX_NAME_CHARS, description="Names a session where nothing else does."
    )
    metadata: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = Field(default=None, max_length=MAX_METADATA)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(default=None, description="Prefixes are shared within a tenant without it.")


class SamplingFields(ConstraintFields, CommonFields):
    """Parameters of both completion endpoints."""

    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Newer name of max_tokens.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: Annotated[dict[str, Bias] | None, at_most(MAX_LOGIT_BIAS)] = Field(
        default=None, max_length=MAX_LOGIT_BIAS, description="Token id (as a string) to bias."
    )
    stop: StopString | StopList | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=128, fail_fast=True)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "differs from max_completion_tokens; send one of them", {"param": "max_tokens"}
            )
        return self
