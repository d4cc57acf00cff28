"""Requests of all kinds: chat and completions, scripts and code, sampling, penalties, schemas, log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.attack.clients import CHAT, COMPLETIONS
from benchmarks.attack.server import MODEL

Request = tuple[str, dict[str, Any]]
"""Path and body."""

_WORDS = (
    "apple", "river", "quantum", "legal", "the", "of", "plaintiff", "defendant", "patient", "insulin", "dosage",
    "function", "return", "array", "loop", "buffer", "whereas", "therefore", "pursuant", "mitochondria", "enzyme",
    "compiler", "pointer", "thread", "socket",
)  # fmt: skip
_CODE = (
    "def fibonacci(n):\n    ", "class Stack:\n    def __init__(self):\n", "#include <stdio.h>\nint main(void) {\n",
    "SELECT name, COUNT(*) FROM users WHERE ", "fn main() {\n    let mut v = vec![",
    "import numpy as np\n\ndef softmax(x):\n", "public static void main(String[] args) {\n",
    "for i in range(10):\n    print(", "<html><head><title>", '{"name": "Alice", "age": 30}\n{"name": ',
)  # fmt: skip
_SCRIPTS = (
    "Привет, как дела?", "你好，请介绍一下北京。", "こんにちは、", "مرحبا كيف", "😀😃😄😁😆", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕥𝕖𝕤𝕥",
    "Ça va très bien, où est", "Zażółć gęślą jaźń", "e\u0301e\u0301e\u0301", "\u200b\u200b zero width",
    "नमस्ते दुनिया", "ไทย ภาษา", "한국어 문장",
)  # fmt: skip
_QUESTIONS = (
    "Why is the sky blue?", "Explain the doctrine of promissory estoppel in contract law.",
    "What are the symptoms of type 2 diabetes?", "Write a poem about the sea.", "List the first 20 prime numbers.",
    "Summarize the French Revolution.", "Translate 'good morning' to Spanish, French, German.",
    "Write a Python function that reverses a linked list.", "What is the capital of Australia and why?",
    "Compose a formal letter of resignation.", "Give me a recipe for pancakes.", "Count from 1 to 50.",
    "Repeat the word banana 30 times.", "Write JSON with three users.", "Explain how vaccines work.",
    "Draft a non-disclosure agreement clause.",
)  # fmt: skip
_PERSON = {"name": {"type": "string"}, "age": {"type": "integer"}}
_POINT = {"x": {"type": "number"}, "ok": {"type": "boolean"}}
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {**_PERSON, "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4}},
        "required": ["name", "age", "tags"],
    },
    {
        "type": "array",
        "items": {"type": "object", "properties": _POINT, "required": ["x", "ok"]},
        "maxItems": 5,
    },
    {"type": "string", "pattern": "^[A-Z][a-z]{3,12}( [a-z]{2,8}){3}$"},
    {"enum": ["red", "green", "blue", "a rather long colour name that repeats"]},
)
_FORMATS = (
    {"type": "json_object"},
    *({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in _SCHEMAS),
)
_VOCABULARY = 49_152
_OPTIONS: Sequence[tuple[float, str, Sequence[Any]]] = (
    (0.3, "frequency_penalty", (-1.5, -0.5, 0.3, 1.2, 2)),
    (0.25, "presence_penalty", (-2, 0.4, 1.5)),
    (0.2, "repetition_penalty", (0.8, 1.1, 1.5)),
    (0.3, "stop", (["."], ["\n\n", "the"], [" a", "1"], ["```"], ["、", "。"])),
    (0.15, "min_tokens", (1, 7, 8)),
    (0.1, "ignore_eos", (True,)),
    (0.2, "response_format", _FORMATS),
)
"""Probability, name and values of what a request may have."""
_SAMPLING: Sequence[tuple[float, str, Sequence[Any]]] = (
    (0.5, "top_p", (0.5, 0.9, 0.99)),
    (0.3, "top_k", (1, 5, 50)),
    (0.2, "min_p", (0.02, 0.1)),
    (0.25, "n", (2, 3)),
)


def varied_requests(seed: int, count: int) -> list[Request]:
    """``count`` requests; the same ``seed`` makes the same ones."""
    chance = random.Random(seed)
    return [_request(chance) for _ in range(count)]


def _request(chance: random.Random) -> Request:
    is_chat = chance.random() < 0.6
    body: dict[str, Any] = {"model": MODEL, "max_tokens": chance.choice((8, 24, 48, 64, 96))}
    prompt = _prompt(chance)
    if is_chat:
        system = [{"role": "system", "content": "You are terse."}] if chance.random() < 0.3 else []
        body["messages"] = [*system, {"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    if chance.random() < 0.5:
        body["temperature"] = 0
    else:
        body |= {"temperature": chance.choice((0.3, 0.7, 1.0, 1.3, 2.0)), "seed": chance.randint(-(2**63), 2**63 - 1)}
        body |= _some(chance, _SAMPLING)
    body |= _some(chance, _OPTIONS)
    if chance.random() < 0.2:
        count = chance.choice((1, 5, 200))
        body["logit_bias"] = {
            str(chance.randrange(_VOCABULARY)): chance.choice((-100, -5, 3, 8, 20)) for _ in range(count)
        }
    if chance.random() < 0.15:
        body["stop_token_ids"] = [chance.randrange(300) for _ in range(5)]
    if chance.random() < 0.3:
        top = chance.choice((0, 3, 20))
        body |= {"logprobs": True, "top_logprobs": top} if is_chat else {"logprobs": top, "echo": chance.random() < 0.3}
    return (CHAT if is_chat else COMPLETIONS), body


def _some(chance: random.Random, options: Sequence[tuple[float, str, Sequence[Any]]]) -> dict[str, Any]:
    return {name: chance.choice(values) for probability, name, values in options if chance.random() < probability}


def _prompt(chance: random.Random) -> str:
    """A question, code, another script, a text that repeats itself, or words at random, few or many."""
    question = chance.choice(_QUESTIONS)
    kind = chance.random()
    if kind < 0.3:
        return question
    if kind < 0.45:
        return chance.choice(_CODE)
    if kind < 0.6:
        return f"{chance.choice(_SCRIPTS)} {question}"
    if kind < 0.75:
        return f"{question} " * chance.randint(3, 40)
    if kind < 0.85:
        return " ".join(chance.choices(_WORDS, k=chance.randint(200, 900))) + f"\n{question}"
    return " ".join(chance.choices(_WORDS, k=chance.randint(1, 12)))
