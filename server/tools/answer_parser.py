"""An answer's text taken apart as it comes: thoughts, content, and calls of tools. By ``transformers``' parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.tools.chat_format import THINK_BEGIN, THINK_END, CallFormat, ChatFormat

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

_CHARS_AT_ONCE = 4096
"""At each mark that it finds, the parser looks through all the text it was given for others."""

_NAME = r"[a-zA-Z0-9_.-]{1,128}"
"""A tool's."""


@dataclass
class CallPart:
    """More of a call: its name, whole, with its first part only, then text of its arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass
class AnswerPart:
    """What a piece of text adds to an answer. ``calls``: in order, one entry for each call that it adds to."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)


class AnswerParser:
    """Takes one answer apart; what its parts are when joined does not depend on how the text was split.

        parser = AnswerParser(form, with_calls=True, is_thinking=False)
        part = parser.push(text, is_last=False)

    Args:
        form: how the model writes answers.
        with_calls: whether it was given tools; without them, what looks like a call is content.
        is_thinking: whether the prompt has begun its thoughts.
    """

    def __init__(self, form: ChatFormat, with_calls: bool, is_thinking: bool) -> None:
        self._form = form.calls if with_calls else None
        self._parser: ResponseParser | None = None
        """None: all of an answer is content."""
        if with_calls or form.thinks:
            from transformers.utils.chat_parsing import ResponseParser  # half a second, for models that need it only

            prefix = THINK_BEGIN if is_thinking else ""
            self._parser = ResponseParser(_response_template(self._form, form.thinks), prefix=prefix)
        self._num_calls = 0
        self._is_named = True
        """Whether the name of the current call was told."""

    def push(self, text: str, is_last: bool) -> AnswerPart:
        """What ``text`` adds; at the end, also what had to wait because it might have become something else."""
        part = AnswerPart()
        for event in self._events(text, is_last):
            self._take(event, part)
        return part

    def push_in_order(self, text: str, is_last: bool) -> Iterator[AnswerPart]:
        """The same as several parts, each with one thing in it, in their order."""
        for event in self._events(text, is_last):
            part = AnswerPart()
            self._take(event, part)
            yield part

    def _events(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        if self._parser is None:
            return [{"type": "region_chunk", "field": "content", "text": text}]
        events: list[dict[str, Any]] = []
        for begin in range(0, len(text), _CHARS_AT_ONCE):
            events += self._parser.feed(text[begin : begin + _CHARS_AT_ONCE])
        return events + self._parser.finalize()[1] if is_last else events

    def _take(self, event: dict[str, Any], part: AnswerPart) -> None:
        match event["type"], event["field"]:
            case "region_chunk", "content":
                part.content += event["text"]
            case "region_chunk", "reasoning":
                part.reasoning += event["text"]
            case "region_open", "calls":
                self._num_calls += 1
                self._is_named = False
            case "region_chunk", "calls":
                self._take_call(event["text"], part)

    def _take_call(self, text: str, part: AnswerPart) -> None:
        """More text of a call: first its name and ``middle`` at once, then its arguments."""
        name = ""
        if not self._is_named:
            assert self._form is not None
            name, _, text = text.partition(self._form.middle)
            self._is_named = True
        index = self._num_calls - 1
        if not part.calls or part.calls[-1].index != index:
            part.calls.append(CallPart(index))
        part.calls[-1].name += name
        part.calls[-1].arguments += text


def load_parser(form: ChatFormat) -> None:
    """Import what answers of this form are parsed with, before the first request waits for it."""
    if form.calls is not None or form.thinks:
        AnswerParser(form, with_calls=True, is_thinking=False)


def _response_template(form: CallFormat | None, thinks: bool) -> dict[str, Any]:
    """Where an answer's parts begin and end, for ``ResponseParser``. Line feeds between them belong to none.

    Literal marks, not patterns, as far as possible: for each end of a pattern the parser copies the text so far. A call
    begins only where a name and ``middle`` follow: JSON that is no call may begin as calls of Llama do.
    """
    gaps = ("", "\n", "\n\n")
    fields: dict[str, dict[str, Any]] = {"content": {}}
    if thinks:
        fields["reasoning"] = {
            "open": [THINK_BEGIN + after for after in gaps],
            "close": [before + THINK_END + after for before in gaps for after in gaps],
        }
    if form is not None:
        at_the_end = {"close_pattern": rf"{re.escape(form.end)}\s{{0,2}}\Z"}
        end = at_the_end if form.separator is None else {"close": form.end}
        begin = rf"\n{{0,2}}{re.escape(form.begin)}(?={_NAME}{re.escape(form.middle)})"
        fields["calls"] = {"open_pattern": begin, "repeats": True} | end
    return {"start_anchor_pattern": "^", "fields": fields}
