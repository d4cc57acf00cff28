"""``evospec chat``: a conversation with any server that speaks OpenAI's API, and how fast it answers."""

from __future__ import annotations

import json
import sys
import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from evospec.server.remote import Remote, RemoteError, check

_MEANINGS = {
    "target": "the model's own",
    "draft": "drafted",
    "session": "drafted, of the session's own",
    "copied": "copied from the text before",
}
_COLOURS = {"draft": 32, "session": 35, "copied": 36}
"""Of a terminal: green, magenta, cyan."""


@dataclass
class AnswerSpeed:
    """Of one answer. Times are ``time.monotonic`` seconds; ``first`` and ``last`` are those of its pieces of text."""

    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0
    tokens_per_step: float | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take in an event of the stream; where the server counts no tokens, each piece of text counts as one."""
        if event.get("choices"):
            self.last = time.monotonic()
            self.first = self.last if self.first is None else self.first
            self.num_tokens += 1
        if usage := event.get("usage"):
            self.num_tokens = usage["completion_tokens"]
        if drafts := (event.get("metrics") or {}).get("speculative_decoding"):
            self.tokens_per_step = drafts["mean_acceptance_length"]

    def __str__(self) -> str:
        first = self.asked if self.first is None else self.first
        rate = (self.num_tokens - 1) / (self.last - first) if self.last > first else 0.0
        text = f"{self.num_tokens} tokens, {rate:.1f} tokens a second, the first after {first - self.asked:.2f} s"
        return text if self.tokens_per_step is None else f"{text}, {self.tokens_per_step:.2f} tokens a step"


class Conversation:
    """What was said, and with whom. Its session lets the draft learn from answer to answer.

    ``model`` None is the first that the server has. Raises ``RemoteError`` if that cannot be asked.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        self._remote = Remote(url, api_key, {"X-Session-Id": f"chat-{uuid.uuid4().hex}"})
        self._messages: list[dict[str, str]] = []
        self.model = model or self._remote.first_model()

    def ask(self, text: str, speed: AnswerSpeed, with_sources: bool) -> Generator[tuple[str, str]]:
        """The answer piece by piece, each with who proposed it if the server tells, else ""; raises ``RemoteError``.

        An error leaves the conversation as it was. Of an answer that is stopped (``KeyboardInterrupt``, or the iterator
        is closed) the part that has come is a part of the conversation.
        """
        question = {"role": "user", "content": text}
        body = {"model": self.model, "messages": [*self._messages, question], "stream": True, "logprobs": with_sources}
        answer, decoder = "", getincrementaldecoder("utf-8")("replace")
        try:
            with self._remote.one_line():
                for event in self._events({**body, "stream_options": {"include_usage": True}}):
                    speed.add(event)
                    for choice in event.get("choices", []):
                        piece = choice["delta"].get("content") or ""
                        answer += piece
                        tokens = (choice.get("logprobs") or {}).get("content") or []
                        if any("source" in token for token in tokens):
                            yield from ((decoder.decode(bytes(one["bytes"] or ())), one["source"]) for one in tokens)
                        else:
                            yield piece, ""
        except (KeyboardInterrupt, GeneratorExit):
            if answer:
                self._messages += [question, {"role": "assistant", "content": answer}]
            raise
        self._messages += [question, {"role": "assistant", "content": answer}]

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._remote.client.stream("POST", "chat/completions", json=body) as response:
            check(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RemoteError(str(event["error"]["message"]))
                yield event


def chat(conversation: Conversation, in_colours: bool) -> None:
    """Ask what comes line by line on standard input, and print the answers.

    At a terminal Ctrl-C stops an answer, and an error costs its question only. Elsewhere ``RemoteError`` is raised.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{conversation.model}: type a message; Ctrl-C stops an answer, Ctrl-D ends.")
    if in_colours:
        print("Tokens are", ", ".join(_coloured(meaning, source) for source, meaning in _MEANINGS.items()))
    while (text := _typed(is_terminal)) is not None:
        if not text.strip():
            continue
        try:
            _answer(conversation, text, in_colours)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n[stopped]\n")
        except RemoteError as error:
            if not is_terminal:
                raise
            print(f"\n[{_harmless(str(error))}]\n")


def _typed(is_terminal: bool) -> str | None:
    """The next line; None: there is none."""
    try:
        return input("> " if is_terminal else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        return None


def _answer(conversation: Conversation, text: str, in_colours: bool) -> None:
    speed = AnswerSpeed()
    with closing(conversation.ask(text, speed, in_colours)) as pieces:
        for piece, source in pieces:
            print(_coloured(_harmless(piece), source), end="", flush=True)
    print(f"\n[{speed}]\n")


def _coloured(text: str, source: str) -> str:
    return f"\x1b[{_COLOURS[source]}m{text}\x1b[0m" if source in _COLOURS else text


def _harmless(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
