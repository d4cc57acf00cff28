"""JSON bodies. Those of clients are looked at for what they would take to hold before anything is made of them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from evospec.server.errors import bad_request

MAX_STRINGS = 2**16
MAX_CONTAINERS = 2**16
MAX_VALUES = 2**19
"""Of all kinds together, counted by the commas between them.

A decoder keeps all other threads waiting: ten milliseconds for as much as this allows, half a second for four megabytes
of empty lists, which take 100 MB as well.
"""


def decode_json(body: bytes) -> Any:
    """The value in ``body``. Strict: no NaN, no lone surrogates, bounded depth.

    Raises ``ApiError``: 400 for what is no JSON, or has too many parts.
    """
    _check_parts(body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise bad_request(f"The request body is not valid JSON: {error}") from error


class JsonResponse(Response):
    """A response with a struct, or with bytes that are JSON already."""

    media_type = "application/json"

    def render(self, content: msgspec.Struct | bytes) -> bytes:
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


def _check_parts(body: bytes) -> None:
    """400 for more strings, lists and objects, or values of any kind than are needed for what can be asked here.

    Never counts too few in what a decoder reads of ``body``, valid or not; too many only where it is no JSON.
    """
    if b"\\" in body:  # stands in strings only, and once pairs of it are gone it is before a quote that ends none
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 2 * MAX_STRINGS:
        raise _too_many(MAX_STRINGS, "strings")
    outside_strings = b"".join(body.split(b'"')[::2])
    if outside_strings.count(b"[") + outside_strings.count(b"{") > MAX_CONTAINERS:
        raise _too_many(MAX_CONTAINERS, "lists and objects")
    if outside_strings.count(b",") > MAX_VALUES:
        raise _too_many(MAX_VALUES, "values")


def _too_many(limit: int, what: str) -> Exception:
    return bad_request(f"The request body has more than {limit} {what}.")
