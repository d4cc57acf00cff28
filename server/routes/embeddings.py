"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.messages import SamplingParams
from server.generation import Generation, Piece
from server.json_bodies import JsonResponse
from server.openapi import errors, success
from server.params import check_model, check_prompts, tokenize_prompts
from server.routes.tenant_route import CurrentTenant, CurrentWork, TenantRoute
from server.schemas.embeddings import Embedding, EmbeddingList, EmbeddingsRequest, EmbeddingsUsage
from server.serving import CurrentServing
from server.sse import run_until_disconnect

router = APIRouter(route_class=TenantRoute)
_PROMPT_ONLY = SamplingParams(max_tokens=1, seed=0, temperature=0, num_speculative_tokens=0, embedding=True)


@router.post("/v1/embeddings", responses={**success(EmbeddingList), **errors(400, 401, 404, 413, 429, 503)})
async def create_embeddings(
    request: Request, body: EmbeddingsRequest, tenant: CurrentTenant, work: CurrentWork, serving: CurrentServing
) -> Response:
    """The mean of the model's last hidden states of each input, of length 1."""
    check_model(body.model, serving.model)
    info = serving.engine_info
    prompts = await tokenize_prompts(work, serving.tokenizer, body.input, info, field="input")
    check_prompts(prompts, "input", info)
    generation = Generation(serving, tenant, prompts, _PROMPT_ONLY, n=1, keep_output=False)

    def encode(pieces: Sequence[Piece]) -> bytes:
        in_order = sorted(pieces, key=lambda piece: piece.index)
        as_text = body.encoding_format == "base64"
        data = [Embedding(index=piece.index, embedding=_encoded(piece.embedding, as_text)) for piece in in_order]
        tokens = generation.usage().prompt_tokens
        return msgspec.json.encode(EmbeddingList(data=data, model=serving.model, usage=EmbeddingsUsage(tokens, tokens)))

    async def collect() -> bytes:
        async with aclosing(generation.run()) as steps:
            pieces = [piece async for step in steps for piece in step]
        return await generation.in_share(pieces, encode)

    return JsonResponse(await run_until_disconnect(request.receive, collect()))


def _encoded(values: bytes | None, as_text: bool) -> list[float] | str:
    assert values is not None, "a request's only output has the embedding"
    return base64.b64encode(values).decode() if as_text else array("f", values).tolist()
