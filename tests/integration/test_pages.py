"""What people and web pages get: /docs, CORS, and what the server says of itself and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import jinja2
import pytest

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.server.tenants import hash_key
from tests.integration.running_api import CHAT

ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}
KEYS = ("--auth.keys", f"acme={hash_key('secret')}")


def one_token(request: EngineRequest) -> Iterable[EngineOutput]:
    yield EngineOutput(request_id=request.request_id, token_ids=[300], finish_reason="length")


async def test_docs_need_neither_a_key_nor_other_hosts(serve: Any) -> None:
    async with serve(one_token, *KEYS) as api:
        page = await api.client.get("/docs")
        links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
        files = [await api.client.get(f"/{link}") for link in links]
        spec = await api.client.get("/openapi.json")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert links
    assert [file.status_code for file in files] == [200] * len(links)
    assert all(len(file.content) == int(file.headers["content-length"]) for file in files)
    assert spec.status_code == 401
    assert "acme" not in page.text + "".join(file.text for file in files)


async def test_web_pages_of_other_origins_may_call_where_they_are_allowed(serve: Any) -> None:
    async with serve(one_token, *KEYS, "--allowed-origins", ORIGIN) as api:
        preflight = await api.client.options("/v1/chat/completions", headers=PREFLIGHT)
        foreign = await api.client.options(
            "/v1/chat/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"}
        )
        headers = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
        answer = await api.client.post("/v1/chat/completions", json={**CHAT, "chat_id": 1}, headers=headers)
        refused = await api.client.get("/v1/models", headers={"Origin": ORIGIN})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in foreign.headers
    assert [each.headers["access-control-allow-origin"] for each in (answer, refused)] == [ORIGIN] * 2
    assert "X-Ignored-Fields" in answer.headers["access-control-expose-headers"]
    assert [answer.status_code, refused.status_code] == [200, 401]


async def test_no_origin_is_allowed_by_default(serve: Any) -> None:
    async with serve(one_token) as api:
        preflight = await api.client.options("/v1/chat/completions", headers=PREFLIGHT)
        answer = await api.client.get("/v1/models", headers={"Origin": ORIGIN})
    assert preflight.status_code == 405
    assert not [name for name in (*preflight.headers, *answer.headers) if name.startswith("access-control")]


async def test_an_overview_is_of_the_tenant_that_asks_and_an_admin_sees_all(serve: Any) -> None:
    keys = ",".join(f"{tenant}={hash_key(tenant)}" for tenant in ("acme", "bravo"))
    async with serve(one_token, "--auth.keys", keys, "--auth.admin_key", hash_key("admin")) as api:
        seen = {}
        for tenant in ("acme", "bravo"):
            api.client.headers["Authorization"] = f"Bearer {tenant}"
            assert (await api.post("/v1/completions", max_tokens=1)).status_code == 200
        for key in ("acme", "bravo", "admin"):
            api.client.headers["Authorization"] = f"Bearer {key}"
            seen[key] = (await api.client.get("/v1/overview")).json()
        del api.client.headers["Authorization"]
        without_key = await api.client.get("/v1/overview")
    assert without_key.status_code == 401
    assert {key: [one["tenant"] for one in body["tenants"]] for key, body in seen.items()} == {
        "acme": ["acme"],
        "bravo": ["bravo"],
        "admin": ["acme", "bravo"],
    }
    assert [key for key, body in seen.items() if body["engine"] is not None] == ["admin"]


@pytest.mark.parametrize("path", ["/version", "/tokenizer_info"])
async def test_what_the_server_is_needs_a_key(serve: Any, path: str) -> None:
    async with serve(one_token, *KEYS) as api:
        assert (await api.client.get(path)).status_code == 401


async def test_version_and_tokenizer_info(serve: Any) -> None:
    async with serve(one_token) as api:
        said = (await api.client.get("/version")).json()
        info = (await api.client.get("/tokenizer_info")).json()
        tokens = (await api.client.post("/tokenize", json={"messages": CHAT["messages"]})).json()["tokens"]
    rendered = jinja2.Template(info["chat_template"]).render(messages=CHAT["messages"], add_generation_prompt=True)
    assert said == {"version": version("evospec")}
    assert api.tokenizer.decode(tokens, skip_special_tokens=False) == rendered
    assert info["eos_token"] == api.tokenizer.id_to_token(api.tokenizer.eos_token_ids[0])
    assert (info["model_max_length"], info["vocab_size"]) == (64, api.tokenizer.vocab_size)
