"""The parts of /openapi.json that FastAPI cannot know."""

from __future__ import annotations

from threading import Lock
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.anthropic.objects import ErrorMessage, MessageEvent, MessageObject, TokenCount
from server.anthropic.request import CountTokensRequest, MessagesRequest
from server.errors import ErrorResponse
from server.responses.objects import DeletedResponse, ResponseEvent, ResponseObject
from server.responses.request import ResponsesRequest
from server.schemas.adapters import AcceptedCommand, AdapterList
from server.schemas.chat import ChatChunk, ChatCompletion, ChatCompletionRequest
from server.schemas.completions import Completion, CompletionRequest
from server.schemas.embeddings import EmbeddingList, EmbeddingsRequest
from server.schemas.models import ModelCard, ModelList, Version
from server.schemas.overview import Overview
from server.schemas.sessions import DeletedSession, Session
from server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)

RESPONSES = (
    Completion,
    ChatCompletion,
    ChatChunk,
    EmbeddingList,
    Session,
    DeletedSession,
    ModelList,
    ModelCard,
    TokenizeResponse,
    DetokenizeResponse,
    TokenizerInfo,
    Version,
    AdapterList,
    AcceptedCommand,
    Overview,
    ResponseObject,
    ResponseEvent,
    DeletedResponse,
    MessageObject,
    MessageEvent,
    ErrorMessage,
    TokenCount,
)

_DESCRIPTIONS = {
    400: "A field is invalid or not supported; `param` names it.",
    401: "No API key, or an unknown one.",
    403: "The key is for something else, or no admin key is configured.",
    404: "No such model, session or stored response.",
    413: "The body is too large.",
    429: "The tenant's rate limit is reached; see Retry-After.",
    503: "The server is overloaded or the engine is not ready; see Retry-After.",
}

Responses = dict[int | str, dict[str, Any]]


def errors(*statuses: int, body: type[msgspec.Struct] | None = None) -> Responses:
    """Documentation of error responses, for a route's ``responses``; wherever a key is needed, 403 is one.

    ``body``: theirs, if it is not that of OpenAI's API.
    """
    with_keys = sorted({*statuses, 403}) if 401 in statuses else statuses
    kind: dict[str, Any] = {"model": ErrorResponse}
    if body is not None:
        kind = {"content": {"application/json": {"schema": _reference(body)}}}
    return {status: {**kind, "description": _DESCRIPTIONS[status]} for status in with_keys}


def success(body: type[msgspec.Struct], stream_event: type[msgspec.Struct] | None = None) -> Responses:
    """Documentation of a 200 with ``body``, or a stream of events, for a route's ``responses``."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(body)}}
    if stream_event is not None:
        content["text/event-stream"] = {"schema": {}, "x-event": _reference(stream_event)}
    return {200: {"description": "Success", "content": content}}


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def install_openapi(app: FastAPI, model: str, needs_key: bool) -> None:
    """Make ``app.openapi()`` say what this server accepts: its model, and keys only where they are needed.

    Threads may call it; the first that does makes the description.
    """
    lock = Lock()

    def openapi() -> dict[str, Any]:
        with lock:
            if app.openapi_schema is None:
                app.openapi_schema = _describe(app, model, needs_key)
            return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def _describe(app: FastAPI, model: str, needs_key: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _describe_bodies(schema["components"]["schemas"], model)
    for operations in schema["paths"].values():
        for operation in operations.values():
            _describe_operation(operation, model, needs_key)
    return schema


def _describe_bodies(schemas: dict[str, Any], model: str) -> None:
    _, components = msgspec.json.schema_components(RESPONSES, ref_template="#/components/schemas/{name}")
    schemas.update(components)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    chats = (ChatCompletionRequest, ResponsesRequest, MessagesRequest, CountTokensRequest)
    for request in (CompletionRequest, EmbeddingsRequest, *chats):
        schemas[request.__name__]["properties"]["model"]["enum"] = [model]
    for optional in (TokenizeRequest, DetokenizeRequest):
        schemas[optional.__name__]["properties"]["model"] = {"enum": [model, None]}


def _describe_operation(operation: dict[str, Any], model: str, needs_key: bool) -> None:
    operation["responses"].pop("422", None)  # we answer with 400
    if not needs_key:
        operation.pop("security", None)
    for parameter in operation.get("parameters", []):
        if parameter["name"] == "model":
            parameter["schema"]["enum"] = [model]
