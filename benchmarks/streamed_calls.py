"""That streamed calls of tools and streamed JSON are the same with drafts and without:
``python -m benchmarks.streamed_calls --url URL``.

Half of the prompts have tools, of which the model has to call at least one, the other half a JSON schema. Every other
one is sampled from a seed, the rest is greedy. Each is answered twice, and both streams have to make the same message.
Eight are asked at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import httpx
import typer

from benchmarks.prompts.build import Prompt, read_eval

_NUMBER, _TEXT = {"type": "integer"}, {"type": "string", "maxLength": 60}
_WORDS = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 5}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _tool(name: str, about: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": about, "parameters": _object(**properties)}}


TOOLS = [
    _tool("search", "Search the web", query=_TEXT, count=_NUMBER),
    _tool("look_up", "Look words up in a dictionary", words=_WORDS),
    _tool("remember", "Write something down for later", title=_TEXT, facts=_WORDS, is_urgent={"type": "boolean"}),
]
SCHEMA = _object(subject=_TEXT, summary=_TEXT, words=_WORDS, length=_NUMBER)
WAYS = ("tools", "JSON")
_AT_ONCE = 8


def request_of(number: int, messages: Any, model: str) -> tuple[str, dict[str, Any]]:
    """What is asked for, and the request."""
    way = WAYS[number % 2]
    sampling = {"temperature": 0.8, "seed": number} if number // 2 % 2 else {"temperature": 0}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": model, "messages": messages, "max_tokens": 160, **stream, **sampling}
    if way == "tools":
        return way, {**body, "tools": TOOLS, "tool_choice": "required"}
    return way, {**body, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The message that a stream's events make, and how many draft tokens were accepted in it."""
    message: dict[str, Any] = {"content": "", "calls": [], "finish_reason": None}
    accepted = 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "metrics" in event:
                accepted = event["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
            for choice in event["choices"]:
                message["content"] += choice["delta"].get("content") or ""
                message["finish_reason"] = choice["finish_reason"]
                for call in choice["delta"].get("tool_calls", []):
                    if "id" in call:
                        message["calls"].append([call["function"]["name"], ""])
                    message["calls"][call["index"]][1] += call["function"].get("arguments", "")
    return message, accepted


def check(message: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a whole answer that is not what was asked for."""
    if message["finish_reason"] != "length":
        for text in [arguments for _, arguments in message["calls"]] or [message["content"]]:
            json.loads(text)


def main(
    url: Annotated[str, typer.Option(help="Base URL, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name the server knows.")] = "qwen2.5-coder-0.5b",
) -> None:
    """Ask a running server; exits with 1 unless all are equal."""
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(_AT_ONCE) as pool:

        def compare(numbered: tuple[int, Prompt]) -> Counter[str]:
            way, body = request_of(numbered[0], numbered[1].messages, model)
            with_drafts, accepted = streamed(client, body)
            without, accepted_without = streamed(client, body | {"num_speculative_tokens": 0})
            check(with_drafts)
            if with_drafts != without:
                typer.echo(f"{numbered[1].id}: {with_drafts} with drafts, {without} without")
            end, calls = f"{way}: ended by {without['finish_reason']}", len(without["calls"])
            drafts = {"accepted drafts": accepted, "accepted drafts without drafts": accepted_without}
            equal = int(with_drafts == without)
            return Counter({f"{way}: asked": 1, f"{way}: equal": equal, f"{way}: calls": calls, end: 1, **drafts})

        counts = Counter[str]()
        for of_prompt in pool.map(compare, enumerate(read_eval())):
            counts.update(of_prompt)
    for name, value in sorted(counts.items()):
        typer.echo(f"{name}: {value}")
    raise typer.Exit(sum(counts[f"{way}: equal"] for way in WAYS) < sum(counts[f"{way}: asked"] for way in WAYS))


if __name__ == "__main__":
    typer.run(main)
