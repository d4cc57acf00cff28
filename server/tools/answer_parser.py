"""An answer's text taken apart as it comes: thoughts, content, and calls of tools. By ``transformers``' parser."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from evospec.server.tools.chat_format import THINK_BEGIN, THINK_END, CallFormat, ChatFormat

if TYPE_CHECKING:
    from transformers.utils.chat_parsing import ResponseParser

_CHARS_AT_ONCE = 4096
"""At each mark that it finds, the parser looks through all the text it was given for others."""

_NAME = r"[a-zA-Z0-9_.-]{1,128}"
"""A tool's."""


Kind = Literal["text", "thoughts", "call"]


@dataclass
class Part:
    """More text of an answer; of a call it is more of its arguments, with its ``name`` in its first part only."""

    kind: Kind
    text: str
    name: str = ""


class AnswerParser:
    """Takes one answer apart; what its parts are when joined does not depend on how the text was split.

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
        self._is_named = True
        """Whether the name of the current call was told."""

    def push(self, text: str, is_last: bool) -> list[Part]:
        """What ``text`` adds, in order; at the end, also what had to wait because it might have become something else.

        No two parts in a row are of the same kind and call, and none but the first of a call is without text.
        """
        parts: list[Part] = []
        for event in self._events(text, is_last):
            part = self._part(event)
            if parts and part.kind == parts[-1].kind and not part.name:
                parts[-1].text += part.text
            elif part.text or part.name:
                parts.append(part)
        return parts

    def _events(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        if self._parser is None:
            return [{"type": "region_chunk", "field": "content", "text": text}]
        events: list[dict[str, Any]] = []
        for begin in range(0, len(text), _CHARS_AT_ONCE):
            events += self._parser.feed(text[begin : begin + _CHARS_AT_ONCE])
        return events + self._parser.finalize()[1] if is_last else events

    def _part(self, event: dict[str, Any]) -> Part:
        """What an event adds, which may be nothing."""
        match event["type"], event["field"]:
            case "region_chunk", "content":
                return Part("text", event["text"])
            case "region_chunk", "reasoning":
                return Part("thoughts", event["text"])
            case "region_open", "calls":
                self._is_named = False
            case "region_chunk", "calls" if self._is_named:
                return Part("call", event["text"])
            case "region_chunk", "calls":  # the name and ``middle`` come at once
                assert self._form is not None
                self._is_named = True
                name, _, arguments = event["text"].partition(self._form.middle)
                return Part("call", arguments, name)
        return Part("text", "")


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
