"""``evospec chat`` against a real server, whose engine follows a script."""

from __future__ import annotations

import asyncio
import io
import operator
import re
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from evospec.engine.messages import EngineOutput, EngineRequest, TokenLogprob, TokenSource
from evospec.engine.text.tokenizer import Tokenizer
from evospec.server import chat_client
from evospec.server.chat_client import Conversation, chat
from evospec.server.remote import RemoteError
from evospec.server.tenants import hash_key
from tests.integration.scripted_engine import Script


@pytest.fixture
def answers(tokenizer: Tokenizer) -> Script:
    """Two tokens, one of which would clear a terminal, and then the text of the end."""

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        ids = tokenizer.encode("so\x1b[2J", add_special_tokens=False)
        for number, token_id in enumerate(ids):
            finish_reason = "stop" if number == len(ids) - 1 else None
            yield EngineOutput(request_id=request.request_id, token_ids=[token_id], finish_reason=finish_reason)  # type: ignore[arg-type]

    return script


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


async def talk(url: str, key: str | None, typed: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Type lines into ``evospec chat``; ``at_terminal``: at a terminal."""
    monkeypatch.setattr("sys.stdin", Terminal(typed) if options.get("at_terminal") else io.StringIO(typed))
    with capture_logs():  # the server's, which would come between
        await asyncio.to_thread(
            lambda: chat(Conversation(url, key, options.get("model")), options.get("in_colours", False))
        )


async def test_answers_are_printed_with_their_speed(
    serve: Any, answers: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(answers, "--auth.keys", f"acme={hash_key('secret')}") as api:
        await talk(str(api.client.base_url), "secret", "Hi\n\nAnd?\n", monkeypatch)
        first, second = api.engine.requests
        prompt = api.tokenizer.decode(second.prompt_token_ids)
    printed = capsys.readouterr().out
    speeds = re.findall(r"so\[2J\n\[(\d+) tokens, [\d.]+ tokens a second, the first after [\d.]+ s\]\n", printed)
    assert [int(number) for number in speeds] == [len(list(answers(first)))] * 2
    assert "\x1b" not in printed
    assert "Hi" in prompt
    assert "And?" in prompt
    assert first.session is not None


async def test_colours_say_who_proposed_each_token(
    serve: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tokenizer.encode("né", add_special_tokens=False)
    sources: list[TokenSource] = [("target", "copied")[number % 2] for number in range(len(ids))]

    def script(request: EngineRequest) -> Iterable[EngineOutput]:
        assert request.sampling.logprobs is not None
        entries = [TokenLogprob(token, -1.0, [], source) for token, source in zip(ids, sources, strict=True)]
        yield EngineOutput(request_id=request.request_id, token_ids=ids, logprobs=entries, finish_reason="stop")

    async with serve(script) as api:
        await talk(str(api.client.base_url), None, "Hi\n", monkeypatch, in_colours=True)
    printed = capsys.readouterr().out
    assert "né\n[" in re.sub(r"\x1b\[\d+m", "", printed)
    assert printed.count("\x1b[36m") == 1 + sources.count("copied") > 1  # with the legend's


@pytest.mark.parametrize(
    ("key", "model", "message"),
    [("wrong", None, "status 401: Missing or unknown API key"), ("secret", "other", "status 404: The model 'other'")],
)
async def test_what_the_server_refuses_is_said_in_its_words(
    serve: Any, answers: Script, monkeypatch: pytest.MonkeyPatch, key: str, model: str | None, message: str
) -> None:
    async with serve(answers, "--auth.keys", f"acme={hash_key('secret')}") as api:
        with pytest.raises(RemoteError, match=message):
            await talk(f"{api.client.base_url}/v1/", key, "Hi\n", monkeypatch, model=model)


async def test_an_error_costs_its_question_only(
    serve: Any, answers: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = f"Hi\n{'long ' * 1000}\nAnd?\n"
    async with serve(answers) as api:
        await talk(str(api.client.base_url), None, typed, monkeypatch, at_terminal=True)
        _, second = api.engine.requests
        prompt = api.tokenizer.decode(second.prompt_token_ids)
        with pytest.raises(RemoteError, match="status 400"):
            await talk(str(api.client.base_url), None, typed, monkeypatch)
    printed = capsys.readouterr().out
    assert len(re.findall(r"\n\[http\S+: status 400: .*\]\n", printed)) == 1
    assert printed.count("so[2J\n[") == 3
    assert "Hi" in prompt
    assert "And?" in prompt
    assert "long" not in prompt


@pytest.mark.parametrize("place", ["AnswerSpeed.add", "_coloured"])
async def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(
    serve: Any, answers: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    original = operator.attrgetter(place)(chat_client)
    pressed = iter([False, False, True])

    def interrupted(*arguments: Any) -> Any:
        if next(pressed, False):
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(f"evospec.server.chat_client.{place}", interrupted)
    async with serve(answers) as api:
        await talk(str(api.client.base_url), None, "Hi\nAnd?\n", monkeypatch, at_terminal=True)
        _, second = api.engine.requests
        prompt = api.tokenizer.decode(second.prompt_token_ids)
    printed = capsys.readouterr().out
    assert re.search(r"> so\n?.*\n\[stopped\]\n\n> so\[2J\n\[\d+ tokens", printed), printed
    assert re.search(r"Hi.*so.*And\?", prompt, re.DOTALL)
    assert "[2J" not in prompt


async def test_ctrl_c_at_the_prompt_ends(
    serve: Any, answers: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    async with serve(answers) as api:
        await talk(str(api.client.base_url), None, "", monkeypatch, at_terminal=True)
        assert not api.engine.requests
    assert "Ctrl-D ends" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://["])
async def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(RemoteError, match=r"^cannot reach [^\n]*$"):
        await talk(url, None, "Hi\n", monkeypatch)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": []}', b'{"data": 5}'])
async def test_another_kind_of_server_is_one_line(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(RemoteError, match="does not answer as OpenAI's API does"):
            await talk(f"http://127.0.0.1:{port}", None, "Hi\n", monkeypatch)
