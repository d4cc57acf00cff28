"""Every error a client can see, in the shape of the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
"""Where it is not simply the request's fault, or the server's."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong; ``param`` names the offending field of the request, if one field is at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, frozen=True):
    """Body of every response with status 400 or higher."""

    error: ErrorDetail


class ApiError(Exception):
    """An error to be answered with ``status`` and an OpenAI error body. ``retry_after`` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _printable(message)
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = None if param is None else _printable(param)
        self.code = code
        self.retry_after = retry_after

    def body(self) -> ErrorResponse:
        """The body in the shape of the OpenAI API."""
        return ErrorResponse(ErrorDetail(self.message, self.type, self.param, self.code))

    def response(self, scope: Scope | None = None) -> Response:
        """The HTTP response, with ``Retry-After`` rounded up to whole seconds, at least 1.

        Its body is what the route of ``scope`` makes of the error (``error_body``), if it is of another API.
        """
        body: Callable[[ApiError], msgspec.Struct] = getattr((scope or {}).get("route"), "error_body", ApiError.body)
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, -int(-self.retry_after // 1)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(msgspec.json.encode(body(self)), self.status, headers, media_type="application/json")


def _printable(text: str) -> str:
    """Text that may quote the client, made safe to send back: of bounded length, without lone surrogates."""
    return text[:1000].encode("utf-8", "replace").decode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 for the field ``param``."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """A 500 that tells the client nothing about the inside; the cause belongs in the log."""
    return ApiError(500, "The server had an internal error. Quote the X-Request-Id when you report it.")


def shutting_down() -> ApiError:
    """A 503 while the server finishes what it has begun."""
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)


def validation_error(errors: Sequence[Any], body: Any) -> ApiError:
    """Pydantic's errors for ``body`` as one 400 that names the field (``stop.2``, ``messages.0.content``).

    A value that fits no member of a union gives an error for each member; the one that got furthest
    into the value is the one meant.
    """
    first = errors[0]
    if tuple(first["loc"]) == ("body",) and "param" not in first.get("ctx", {}):
        return bad_request("The request body must be a JSON object, sent with Content-Type: application/json.")
    paths = [_path(error, body) for error in errors]
    path = max(paths, key=len)
    messages = dict.fromkeys(str(e["msg"]) for e, p in zip(errors, paths, strict=True) if p == path)
    param = ".".join(path)
    kind = errors[paths.index(path)]["type"]
    code = "unsupported_parameter" if kind in ("extra_forbidden", "unsupported_parameter", "misspelt") else None
    if kind == "extra_forbidden":
        return bad_request(f"Unknown or unsupported parameter: {param}.", param, code)
    return bad_request(f"{param}: {'; or: '.join(messages)}", param, code)


def body_error(error: ValidationError, body: Any) -> ApiError:
    """What a model of pydantic has against ``body`` as a 400."""
    errors = error.errors(include_url=False)
    return validation_error([{**one, "loc": ("body", *one["loc"])} for one in errors], body)


def _path(error: Any, body: Any) -> list[str]:
    """Where in ``body`` the error is. Pydantic mixes names of union members into the path; they are left out."""
    place, *parts = error["loc"]
    if place in ("path", "query", "header"):
        return [str(part) for part in parts]
    path = []
    for depth, part in enumerate(parts, 1):
        is_key = isinstance(body, dict) and part in body
        is_index = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_key or is_index:
            body = body[part]
        elif not (error["type"] == "missing" and depth == len(parts)):
            continue
        path.append(str(part))
    named: list[str] = [error["ctx"]["param"]] if "param" in error.get("ctx", {}) else []
    return path + named


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error.response(request.scope)
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors(), error.body).response(request.scope)
    assert isinstance(error, HTTPException)
    message = {
        404: f"Unknown path: {request.url.path}",
        405: f"{request.method} is not allowed for {request.url.path}",
    }.get(error.status_code, str(error.detail))
    response = ApiError(error.status_code, message).response(request.scope)
    response.headers.update(error.headers or {})
    return response


def install_error_handlers(app: Starlette) -> None:
    """Answer every error of ``app`` with an OpenAI body (``server.middleware`` covers the unexpected ones)."""
    for kind in (ApiError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
