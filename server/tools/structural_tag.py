"""The grammar of an answer with calls of tools or after thoughts: a structural tag of xgrammar, as JSON.

Each call is a tag: its begin names the tool, and its content is JSON by the tool's own schema. So a call that has begun
can only be a right one.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import msgspec

from evospec.engine.messages import Grammar
from evospec.engine.sampling.json_schema import (
    MAX_SCHEMA_CHARS,
    GrammarError,
    annotations_in,
    check_json_schema,
    rewrite_pattern,
    rewrite_patterns,
    subschemas,
)
from evospec.server.errors import bad_request
from evospec.server.schemas.chat import ChatCompletionRequest
from evospec.server.schemas.tools import Function, NamedChoice
from evospec.server.tools.chat_format import THINK_BEGIN, THINK_END, CallFormat, ChatFormat

_ANY_OBJECT = {"type": "object", "additionalProperties": True}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_WHITESPACE = 1
"""Characters of it in a row that JSON may have: models were trained on arguments in one line, and with more room small
models write line feeds without end."""
_MAX_CHARS = 4 * MAX_SCHEMA_CHARS
"""Of all parameters with their descriptions, which are left out of the grammar."""

Format = dict[str, Any]


def check_tools(body: ChatCompletionRequest, form: ChatFormat) -> None:
    """400 for tools, or calls of them in the conversation, that the model's template could not show the model."""
    if form.calls is not None:
        return
    why = "The chat template of this model does not say how to call tools in a way that this server knows"
    if body.usable_tools:
        raise bad_request(f'{why}; without tools, or with tool_choice "none", it answers.', "tools")
    if any(message.role == "tool" or message.tool_calls for message in body.messages):
        raise bad_request(f"{why}, so there is no place for calls and their results either.", "messages")


def chat_grammar(
    body: ChatCompletionRequest, constraint: Grammar | None, form: ChatFormat, is_thinking: bool
) -> Grammar | None:
    """What the answer to a request may look like; None: anything. ``constraint``: on an answer that calls no tool.

    Raises ``ApiError``: 400 for a schema that the engine would refuse, or for tools that are too long in all.
    """
    if not body.usable_tools and (constraint is None or not is_thinking):
        return constraint
    if len(msgspec.json.encode([tool.function.parameters for tool in body.usable_tools])) > _MAX_CHARS:
        raise bad_request(f"The parameters of all tools are longer than {_MAX_CHARS} characters.", "tools")
    try:
        answer = None if constraint is None else _constrained(constraint)
        if body.usable_tools and form.calls is not None:
            answer = _with_calls(body, answer, form.calls)
        text = json.dumps({"type": "structural_tag", "format": _after_thoughts(answer, form.thinks, is_thinking)})
    except RecursionError as error:
        raise bad_request("The parameters of a tool are nested too deeply.", "tools") from error
    except GrammarError as error:
        raise bad_request(str(error)) from error
    if len(text) > MAX_SCHEMA_CHARS:
        raise bad_request(
            f"What an answer may be takes more than {MAX_SCHEMA_CHARS} characters, descriptions not counted.", "tools"
        )
    return Grammar("structural_tag", text)


def _with_calls(body: ChatCompletionRequest, answer: Format | None, form: CallFormat) -> Format:
    """Calls, where the request wants them, else calls or ``answer`` (None: any text)."""
    choice = body.tool_choice or "auto"
    named = choice.function.name if isinstance(choice, NamedChoice) else None
    functions = [(index, tool.function) for index, tool in enumerate(body.usable_tools)]
    tags = {
        "tags": [_tag(index, function, form) for index, function in functions if named in (None, function.name)],
        "stop_after_first": form.separator is None or body.parallel_tool_calls is False or named is not None,
    }
    if choice == "auto" and answer is None:
        return {"type": "triggered_tags", "triggers": [form.trigger], **tags}
    calls = {"type": "tags_with_separator", "separator": form.separator or "", "at_least_one": True, **tags}
    return {"type": "or", "elements": [answer, calls]} if choice == "auto" else calls


def _constrained(constraint: Grammar) -> Format:
    text = constraint.schema or ""
    match constraint.kind:
        case "regex":
            return {"type": "regex", "pattern": rewrite_pattern(text, to_ascii=False)}
        case "ebnf":
            return {"type": "grammar", "grammar": text}
        case "json_schema":
            return _json(_enforceable(json.loads(text)))
    return _json(_ANY_OBJECT)


def _tag(index: int, function: Function, form: CallFormat) -> Format:
    begin = form.begin + function.name + form.middle
    return {"type": "tag", "begin": begin, "content": _json(_parameters(index, function)), "end": form.end}


def _json(schema: Any) -> Format:
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _WHITESPACE}


def _parameters(index: int, function: Function) -> Any:
    """The schema that the arguments are held to: the tool's own one, if it can be enforced or is to be (``strict``)."""
    if function.parameters is None:
        return _NO_ARGUMENTS
    if function.strict is False:
        return _ANY_OBJECT
    try:
        return _enforceable({"type": "object", **function.parameters})
    except GrammarError as error:
        if function.strict:
            raise bad_request(str(error), f"tools.{index}.function.parameters") from error
        return _ANY_OBJECT


def _enforceable(schema: dict[str, Any]) -> Any:
    """The schema for xgrammar, without what only people read; raises ``GrammarError``."""
    schema = deepcopy(schema)
    for _, part in subschemas(schema):
        if isinstance(part, dict):
            for keyword in annotations_in(part):
                del part[keyword]
    text = json.dumps(schema)
    check_json_schema(text)
    return json.loads(rewrite_patterns(text))


def _after_thoughts(answer: Format | None, thinks: bool, is_thinking: bool) -> Format:
    """The answer of a model that may think first, or has begun to."""
    assert answer is not None
    if not thinks:
        return answer
    thoughts: Format = {
        "type": "sequence",
        "elements": [
            {
                "type": "tag",
                "begin": "" if is_thinking else THINK_BEGIN,
                "content": {"type": "any_text"},
                "end": THINK_END,
            },
            {"type": "regex", "pattern": "[\\n ]{0,2}"},
        ],
    }
    first = thoughts if is_thinking else {"type": "optional", "content": thoughts}
    return {"type": "sequence", "elements": [first, answer]}
