"""The parts of /openapi.json that FastAPI cannot know."""

from __future__ import annotations

from threading import Lock
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from evospec.server.errors import ErrorResponse

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
_bodies: dict[str, type[msgspec.Struct]] = {}
"""All that routes answer with, by name."""


def errors(*statuses: int, body: type[msgspec.Struct] = ErrorResponse) -> Responses:
    """Documentation of error responses, for a route's ``responses``; wherever a key is needed, 403 is one.

    By default those of a request with a body that names a model.
    """
    statuses = statuses or (400, 401, 404, 413, 429, 503)
    with_keys = sorted({*statuses, 403}) if 401 in statuses else statuses
    content = {"application/json": {"schema": _reference(body)}}
    return {status: {"description": _DESCRIPTIONS[status], "content": content} for status in with_keys}


def success(body: type[msgspec.Struct], stream_event: type[msgspec.Struct] | None = None) -> Responses:
    """Documentation of a 200 with ``body``, or a stream of events, for a route's ``responses``."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(body)}}
    if stream_event is not None:
        content["text/event-stream"] = {"schema": {}, "x-event": _reference(stream_event)}
    return {200: {"description": "Success", "content": content}}


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    _bodies[struct.__name__] = struct
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
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for request in schemas.values():
        properties = request.get("properties", {})
        if "model" in request.get("required", ()):
            properties["model"]["enum"] = [model]
        elif "model" in properties:
            properties["model"] = {"enum": [model, None]}
    schemas.update(msgspec.json.schema_components(_bodies.values(), ref_template="#/components/schemas/{name}")[1])


def _describe_operation(operation: dict[str, Any], model: str, needs_key: bool) -> None:
    operation["responses"].pop("422", None)  # we answer with 400
    if not needs_key:
        operation.pop("security", None)
    for parameter in operation.get("parameters", []):
        if parameter["name"] == "model":
            parameter["schema"]["enum"] = [model]
