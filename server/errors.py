"""Every error a client can see, in the shape of the OpenAI API."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

log = structlog.get_logger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` names the offending field of the request, if one field is at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every response with status 400 or higher."""

    error: ErrorDetail


class ApiError(Exception):
    """An error to be answered with ``status`` and an OpenAI error body.

    ``type`` defaults to the one that belongs to the status. ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "server_error")
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return {"error": detail.model_dump()}

    def response(self) -> Response:
        """The HTTP response, with ``Retry-After`` rounded up to whole seconds, at least 1."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, -int(-self.retry_after // 1)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 for the field ``param``."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """A 500 that tells the client nothing about the inside; the cause belongs in the log."""
    return ApiError(500, "The server had an internal error. Quote the X-Request-Id when you report it.")


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first pydantic error as a 400 that names its field (``stop.2``, ``messages.0.content``)."""
    first = errors[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return bad_request(f"The request body is not valid JSON: {first.get('ctx', {}).get('error', message)}.")
    path = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unknown or unsupported parameter: {param}.", param, "unsupported_parameter")
    return bad_request(f"{param}: {message}" if param else message, param)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(list(error.errors())).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"Unknown path: {request.url.path}",
        405: f"{request.method} is not allowed for {request.url.path}",
    }.get(error.status_code, str(error.detail))
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` with an OpenAI body (``server.middleware`` covers the unexpected ones)."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
