"""What browsers get: the page at /, a chat that shows where each token came from, and /docs with /openapi.json.

Both are the same for everybody, as their files are, and need no key: they ask for one by themselves. /docs is Swagger
UI, whose files are those of the package ``fastapi_swagger``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

router = APIRouter(include_in_schema=False)

_FILES = {path.name: path for path in (Path(__file__).parents[1] / "page").iterdir()}
_SWAGGER_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# In memory: they are large, and a client that reads one slowly must not keep an open file beside its connection.
_SWAGGER = {name: (files("fastapi_swagger") / "resources" / name).read_bytes() for name in _SWAGGER_TYPES}
_CHUNK = 2**16
"""Bytes: a client that reads slowly, or not at all, has no more of a file waiting for it."""
_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# Swagger UI has styles in its elements, and images in its style sheet.
_DOCS_POLICY = f"{_POLICY}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page."""
    return FileResponse(_FILES["index.html"], headers=_HEADERS)


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], headers=_HEADERS)


@router.get("/docs")
async def docs() -> Response:
    """All endpoints, to be tried out."""
    return FileResponse(_FILES["docs.html"], headers={**_HEADERS, "Content-Security-Policy": _DOCS_POLICY})


@router.get("/docs/{name}")
async def docs_file(name: str) -> Response:
    """A file of Swagger UI."""
    if name not in _SWAGGER:
        raise HTTPException(404)
    headers = {**_HEADERS, "Content-Length": str(len(_SWAGGER[name]))}
    return StreamingResponse(_chunks(_SWAGGER[name]), media_type=_SWAGGER_TYPES[name], headers=headers)


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]
