"""What browsers get: the page at /, a chat that shows where each token came from, and /docs with /openapi.json.

Both are the same for everybody, as their files are, and need no key: they ask for one by themselves. /docs is Swagger
UI, whose files are those of the package ``fastapi_swagger``.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)

_FILES = {path.name: path for path in (Path(__file__).parents[1] / "page").iterdir()}
_SWAGGER = Path(str(files("fastapi_swagger")), "resources")
_SWAGGER_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
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
    if name not in _SWAGGER_TYPES:
        raise HTTPException(404)
    return FileResponse(_SWAGGER / name, media_type=_SWAGGER_TYPES[name], headers=_HEADERS)
