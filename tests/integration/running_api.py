"""The HTTP API over a real socket, with a real tokenizer and Valkey, and an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from evospec.engine.models.config import ModelFiles
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server.app import create_app
from evospec.server.http_protocol import bounded_http
from evospec.server.settings import load_settings
from tests.integration.scripted_engine import Script, ScriptedEngine
from tests.tiny_models import VOCAB_SIZE

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "tiny", "prompt": "The dog"}


@dataclass
class Api:
    """A running server with its engine."""

    client: httpx.AsyncClient
    engine: ScriptedEngine
    address: str
    tokenizer: Tokenizer
    app: Any
    server: uvicorn.Server

    async def post(self, path: str, **body: Any) -> httpx.Response:
        base = CHAT if "chat" in path else TEXT
        return await self.client.post(path, json={**base, **body})

    async def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream, decoded; "[DONE]" as text."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.text.removesuffix("\n\n").split("\n\n")
        assert all(block.startswith("data: ") for block in blocks)
        payloads = [block.removeprefix("data: ") for block in blocks]
        return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]

    def cut_off(self) -> None:
        """End all connections and take no new ones, as if the server were killed."""
        for listener in self.server.servers:
            listener.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that must happen."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def until_get(self, path: str, condition: Callable[[httpx.Response], bool]) -> httpx.Response:
        """The first response from ``path`` that satisfies ``condition``."""
        async with asyncio.timeout(20):
            while True:
                if condition(response := await self.client.get(path)):
                    return response

    async def until_health(self, status: int) -> None:
        await self.until_get("/health", lambda response: response.status_code == status)


@asynccontextmanager
async def running_api(
    script: Script,
    model: ModelFiles,
    tokenizer: Tokenizer,
    valkey_url: str,
    directory: Path,
    *options: str,
    draft: str | None = None,
    max_model_len: int = 64,
) -> AsyncIterator[Api]:
    address = f"ipc://{directory}/engine.sock"
    # However busy the machine is, a Valkey that is there answers in ten seconds; of an option's values the last counts.
    redis = ("--redis.url", valkey_url, "--redis.timeout", "10")
    settings = load_settings(["--model", str(model.path), "--engine.address", address, *redis, *options])
    app = create_app(settings)
    http = bounded_http(settings.http, max_connections=1000)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", http=http, ws="none"))
    task = asyncio.create_task(server.serve())
    engine = ScriptedEngine(address, script, VOCAB_SIZE, max_model_len, draft=draft)
    try:
        async with asyncio.timeout(20):
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
            api = Api(client, engine, address, tokenizer, app, server)
            await api.until_health(200)
            yield api
    finally:
        await api.engine.die()
        server.should_exit = True
        await task
