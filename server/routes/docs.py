"""GET /docs: shows /openapi.json by Swagger UI, whose files are those of the package ``fastapi_swagger``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

from server.routes.page import HEADERS

router = APIRouter(include_in_schema=False)

_PAGE = Path(__file__).parents[1] / "page" / "docs.html"
_MEDIA_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_FILES = {name: (files("fastapi_swagger") / "resources" / name).read_bytes() for name in _MEDIA_TYPES}
_CHUNK = 2**16
"""Bytes: a client that reads slowly, or not at all, has no more of a file waiting for it."""
# Swagger UI has styles in its elements, and images in its style sheet.
_POLICY = f"{HEADERS['Content-Security-Policy']}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


@router.get("/docs")
async def docs() -> Response:
    """The page. Like its files it is the same for everybody and needs no key; it asks for one by itself."""
    return FileResponse(_PAGE, headers={**HEADERS, "Content-Security-Policy": _POLICY})


@router.get("/docs/{name}")
async def file(name: str) -> Response:
    """A file of Swagger UI."""
    if name not in _FILES:
        raise HTTPException(404)
    headers = {**HEADERS, "Content-Length": str(len(_FILES[name]))}
    return StreamingResponse(_chunks(_FILES[name]), media_type=_MEDIA_TYPES[name], headers=headers)


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]
