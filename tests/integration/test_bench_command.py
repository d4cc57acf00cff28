"""``evospec bench`` against a real server, whose engine follows a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import typer
from structlog.testing import capture_logs

from evospec.engine.messages import EngineOutput, EngineRequest
from evospec.server.cli import app
from evospec.server.tenants import hash_key


def script(request: EngineRequest) -> Iterable[EngineOutput]:
    """Three steps of two tokens each, one of which was drafted."""
    for step in range(3):
        yield EngineOutput(
            request_id=request.request_id,
            token_ids=[2 * step, 2 * step + 1],
            num_draft_tokens=2,
            num_accepted_tokens=1,
            finish_reason="length" if step == 2 else None,
        )


async def bench(*arguments: str) -> int | None:
    """The exit status."""
    with capture_logs():  # the server's
        status: int | None = await asyncio.to_thread(app, ["bench", *arguments], standalone_mode=False)
    return status


async def test_it_says_how_fast_a_server_is(serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, prompts = tmp_path / "report.json", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "One?"}\n\n{"messages": [{"role": "user", "content": "Two?"}]}\n')
    async with serve(script, "--auth.keys", f"acme={hash_key('secret')}", draft="tiny-draft") as api:
        url = f"{api.client.base_url}/v1"
        levels = ("--concurrency", "1", "--concurrency", "2", "--requests", "4")
        await bench(url, "--api-key", "secret", *levels, "--prompts", str(prompts), "--output", str(output))
        asked = {api.tokenizer.decode(request.prompt_token_ids) for request in api.engine.requests}
    reports = json.loads(output.read_text())
    assert [(level, report["requests"], report["errors"]) for level, report in reports.items()] == [
        ("1", 4, 0),
        ("2", 4, 0),
    ]
    assert all(report["output_tokens"] == 24 for report in reports.values())
    assert all(report["tokens_per_step"] == 2 for report in reports.values())
    assert len(asked) == 2
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "2.00" in printed


async def test_failed_requests_are_told(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async with serve(script) as api:
        assert await bench(str(api.client.base_url), "--model", "other", "--requests", "2") == 1
    printed = capsys.readouterr().out
    assert "2/2" in printed
    assert "HTTP 404" in printed


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", ""])
async def test_prompts_that_are_none_are_one_line(serve: Any, tmp_path: Path, text: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text)
    async with serve(script) as api:
        with pytest.raises(typer.BadParameter, match="prompts"):
            await bench(str(api.client.base_url), "--prompts", str(prompts))
