"""/v1/embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec
from pydantic import Field

from server.schemas.body import LenientBody
from server.schemas.completions import Prompt


class EmbeddingsRequest(LenientBody):
    """Embed one or several texts: a string, token ids, or a list of either."""

    unsupported: ClassVar[dict[str, list[Any]]] = {"dimensions": [], "truncate_prompt_tokens": [], "instruction": []}

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: of float32, little-endian; default: numbers."
    )
    user: str | None = Field(default=None, description="A label without effect.")


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """Of the input at ``index``. Its length is 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    """All of the tokens are of prompts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """Response of /v1/embeddings, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
