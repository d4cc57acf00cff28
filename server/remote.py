"""A server that speaks OpenAI's API, ours or another, as the commands ``chat`` and ``bench`` see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx

_TIMEOUT = httpx.Timeout(600, connect=10)


class RemoteError(Exception):
    """The server cannot be reached, or refuses; the message is one line."""


class Remote:
    """A server at ``url`` (with ``/v1`` or without), ``api_key`` None where it wants none."""

    def __init__(self, url: str, api_key: str | None, headers: Mapping[str, str] | None = None) -> None:
        authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        with self.one_line():
            self.client = httpx.Client(
                base_url=f"{self.url}/v1", headers={**authorization, **(headers or {})}, timeout=_TIMEOUT
            )

    def first_model(self) -> str:
        """The first that the server has; raises ``RemoteError``."""
        with self.one_line():
            response = self.client.get("models")
            check(response)
            return str(response.json()["data"][0]["id"])

    @contextmanager
    def one_line(self) -> Iterator[None]:
        """Raise ``RemoteError`` for whatever may go wrong with a server."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(f"cannot reach {self.url}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RemoteError(f"{self.url} does not answer as OpenAI's API does") from error


def check(response: httpx.Response) -> None:
    """Raise ``RemoteError`` with what the server says, unless it answers with success."""
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise RemoteError(f"{response.url}: status {response.status_code}: {message}")
