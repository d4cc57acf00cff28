"""POST /v1/responses, GET and DELETE /v1/responses/{id}: OpenAI's Responses API."""

from __future__ import annotations

import dataclasses

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from evospec.server.chat_generation import begin_chat
from evospec.server.errors import bad_request
from evospec.server.json_bodies import JsonResponse
from evospec.server.openapi import errors, success
from evospec.server.responses.answer import ResponsesAnswer
from evospec.server.responses.conversation import all_items, fields_of_responses, stored_response, to_chat
from evospec.server.responses.objects import DeletedResponse, ResponseEvent, ResponseObject
from evospec.server.responses.request import ResponsesRequest
from evospec.server.routes.tenant_route import CurrentTenant, CurrentWork, SessionHeader, TenantRoute
from evospec.server.serving import CurrentServing

router = APIRouter(route_class=TenantRoute)


@router.post("/v1/responses", responses=success(ResponseObject, ResponseEvent) | errors())
async def create_response(
    request: Request,
    body: ResponsesRequest,
    tenant: CurrentTenant,
    work: CurrentWork,
    serving: CurrentServing,
    session_header: SessionHeader,
) -> Response:
    """Answer a conversation, which may go on from an earlier answer, whole or as a stream of events."""
    previous = b""
    with fields_of_responses():
        if body.previous_response_id is not None:
            conversation = serving.responses.load(tenant.name, body.previous_response_id)
            previous = await request.state.until_answered.enter_async_context(conversation)
            work = dataclasses.replace(work, size=work.size + len(previous))
        items = await work.run(all_items, body, previous)
        chat = await work.run(to_chat, body, items)
        generation, is_thinking = await begin_chat(chat, session_header, tenant, work, serving)
    answer = await work.run(ResponsesAnswer, body, items, chat, generation, serving, is_thinking, tenant)
    return await answer.respond(request.receive)


async def no_such_path(name: str) -> None:
    """Other servers have more to ask for than GET and DELETE, such as /v1/responses/input_tokens."""
    raise HTTPException(404)


router.add_api_route(
    "/v1/responses/{name}", no_such_path, methods=["POST"], route_class_override=APIRoute, include_in_schema=False
)


@router.get("/v1/responses/{response_id}", responses=success(ResponseObject) | errors(400, 401, 404, 413, 503))
async def get_response(
    response_id: str, tenant: CurrentTenant, serving: CurrentServing, stream: bool = False
) -> Response:
    """A stored response, as it was answered, but never as a stream."""
    if stream:
        raise bad_request("stream: a stored response comes whole only, not as a stream of events", "stream")
    async with serving.responses.load(tenant.name, response_id) as stored:
        response = await serving.work.run(tenant.name, len(stored), stored_response, stored, response_id)
        return Response(response, media_type="application/json")


@router.delete("/v1/responses/{response_id}", responses=success(DeletedResponse) | errors(401, 404, 503))
async def delete_response(response_id: str, tenant: CurrentTenant, serving: CurrentServing) -> Response:
    """Forget what is kept of an answer at once; later answers of its conversation are kept by themselves."""
    await serving.responses.delete(tenant.name, response_id)
    return JsonResponse(DeletedResponse(id=response_id))
