"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from evospec.engine.messages import SamplingParams
from evospec.server.generation import Generation, Piece
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.params import check_model, tokenize_prompts
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from evospec.server.schemas.body import LenientBody
from evospec.server.schemas.completions import Prompt
from evospec.server.serving import CurrentServing
from evospec.server.sse import run_until_disconnect

router = APIRouter(route_class=TenantRoute)
_PROMPT_ONLY = SamplingParams(max_tokens=1, seed=0, temperature=0, num_speculative_tokens=0, embedding=True)


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


@router.post("/v1/embeddings", responses=success(EmbeddingList) | errors())
async def create_embeddings(
    body: EmbeddingsRequest, tenant: CurrentTenant, work: CurrentWork, serving: CurrentServing
) -> Response:
    """The mean of the model's last hidden states of each input, of length 1."""
    check_model(body.model, serving.model)
    info = serving.engine_info
    prompts = await work.run(tokenize_prompts, serving.tokenizer, body.input, info, field="input")
    generation = Generation(serving, tenant, prompts, _PROMPT_ONLY, n=1, keep_output=False)

    def encode(pieces: Sequence[Piece]) -> bytes:
        in_order = sorted(pieces, key=lambda piece: piece.index)
        as_text = body.encoding_format == "base64"
        data = [Embedding(index=piece.index, embedding=_encoded(piece.embedding, as_text)) for piece in in_order]
        tokens = generation.usage().prompt_tokens
        return msgspec.json.encode(EmbeddingList(data=data, model=serving.model, usage=EmbeddingsUsage(tokens, tokens)))

    return JsonResponse(await run_until_disconnect(work.receive, generation.collect(encode)))


def _encoded(values: bytes | None, as_text: bool) -> list[float] | str:
    assert values is not None, "a request's only output has the embedding"
    return base64.b64encode(values).decode() if as_text else array("f", values).tolist()
