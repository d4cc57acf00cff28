"""The page at /: a chat that shows where each token came from, and how drafts fare. It asks for a key by itself."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

router = APIRouter(include_in_schema=False)

_FILES = {path.name: path for path in (Path(__file__).parents[1] / "page").iterdir()}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
async def page() -> Response:
    """The page. Like its files it is the same for everybody and needs no key."""
    return FileResponse(_FILES["index.html"], headers=HEADERS)


@router.get("/page/{name}")
async def file(name: str) -> Response:
    """A file of the page."""
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], headers=HEADERS)
