"""How often a model calls tools of its own accord, here and in ``transformers``: ``python -m benchmarks.auto_calls``.

Each question is asked of a running server with ``tool_choice`` ``auto``, and of the same weights in ``transformers``,
whose own template for Qwen takes the text apart. Half of the conversations have a call before the question, which
leads small models to make another. Everything is greedy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from benchmarks.serve.peers import gguf_path

Conversation = list[Any]
Calls = list[tuple[str, Any]]

QWEN = next(template for families, template in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in families)
_MOST_TOKENS = 60
_BATCH = 10


def _tool(name: str, about: str, **properties: str) -> dict[str, Any]:
    parameters = {name: {"type": kind} for name, kind in properties.items()}
    schema = {"type": "object", "properties": parameters, "required": [*parameters]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS: list[Any] = [
    _tool("get_weather", "The weather in a city now", city="string"),
    _tool("add", "Add two numbers", a="integer", b="integer"),
    _tool("read_file", "Read a file", path="string"),
    _tool("get_time", "The time in a city now", city="string"),
    _tool("translate", "Translate a text", text="string", language="string"),
]
ASKED = {
    "What is the weather in {}?": ("Paris", "Berlin", "Nairobi", "Lima", "Oslo"),
    "What is {}?": ("17 plus 25", "3 plus 4", "120 plus 77", "9 plus 90", "1 plus 1"),
    "Show me the file {}.": ("/etc/hosts", "notes.txt", "/tmp/a.log", "README.md", "src/main.c"),
    "What time is it in {}?": ("Tokyo", "Rome", "Cairo", "Madrid", "Sydney"),
    "Translate {} into French.": ("'good morning'", "'thank you'", "'the red house'", "'bread'", "'I am here'"),
    "{}?": ("Who are you", "What is a prime number", "Why is the sky blue", "What is Python", "How are you"),
}


def conversations() -> list[Conversation]:
    """Every question, alone and after a call of another tool."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_population", "arguments": '{"city": "Bonn"}'}}
    before = [
        {"role": "user", "content": "How many people live in Bonn?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "336,000"},
        {"role": "assistant", "content": "336,000 people live in Bonn."},
    ]
    questions = [form.format(subject) for form, subjects in ASKED.items() for subject in subjects]
    return [[*led, {"role": "user", "content": question}] for led in ([], before) for question in questions]


def served(client: httpx.Client, model: str, messages: Conversation) -> Calls:
    """The calls that the server answers with."""
    body = {"model": model, "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": _MOST_TOKENS}
    [choice] = client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"]
    functions = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return [(each["name"], json.loads(each["arguments"])) for each in functions]


def of_transformers(path: Path, asked: list[Conversation]) -> list[Calls]:
    """For each conversation the calls that ``transformers`` finds in its own answer, computed in float32."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found = []
    for first in range(0, len(asked), _BATCH):
        prompts = tokenizer.apply_chat_template(
            asked[first : first + _BATCH], tools=TOOLS, add_generation_prompt=True, return_dict=True,
            return_tensors="pt", padding=True,
        )  # fmt: skip
        outputs = model.generate(**prompts, do_sample=False, repetition_penalty=1.0, max_new_tokens=_MOST_TOKENS)
        for text in tokenizer.batch_decode(outputs[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True):
            functions = [call["function"] for call in parse_response(text, QWEN, prefix="").get("tool_calls", [])]
            found.append([(each["name"], each["arguments"]) for each in functions])
    return found


def main(
    url: Annotated[str, typer.Option(help="Base URL, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name the server knows.")] = "qwen2.5-coder-0.5b",
) -> None:
    """Print how many answers have calls, and how many are the same; exits with 1 if the server's are fewer."""
    asked = conversations()
    with httpx.Client(base_url=url, timeout=600) as client:
        ours = [served(client, model, messages) for messages in asked]
    theirs = of_transformers(gguf_path(model), asked)
    for messages, here, there in zip(asked, ours, theirs, strict=True):
        if here != there:
            typer.echo(f"{messages[-1]['content']}: {here} served, {there} in transformers")
    with_calls = [sum(map(bool, side)) for side in (ours, theirs)]
    same = sum(here == there for here, there in zip(ours, theirs, strict=True))
    typer.echo(
        f"of {len(asked)} answers {with_calls[0]} have calls as served, {with_calls[1]} in transformers; "
        f"in {same} the calls are the same, or there is none"
    )
    raise typer.Exit(with_calls[0] < with_calls[1])


if __name__ == "__main__":
    typer.run(main)
