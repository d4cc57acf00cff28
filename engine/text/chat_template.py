"""Chat templates: the model's own Jinja program, run in a sandbox as ``transformers`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template can raise over messages and variables that it does not expect."""


class ChatTemplateError(ValueError):
    """The model has no chat template, or it refuses these messages; the message is fit for the client."""


class ChatTemplate:
    """A compiled template. ``variables`` (``bos_token`` and the like) are visible to it.

    ``source`` is the template itself; ``takes`` are the names of the variables that it looks at.

    Raises:
        ChatTemplateError: not a valid Jinja template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda date_format: datetime.now().strftime(date_format)
        try:
            self._template = environment.from_string(source)
            self.takes = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except Exception as error:  # what is nested too deep for Python is a template to Jinja
            raise ChatTemplateError(f"the model's chat template is invalid: {error}") from error
        self.source = source
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text. Entries of a message that are None count as absent.

        ``variables``: more of them, perhaps a client's, so of any JSON value.

        Raises:
            ChatTemplateError: the template refuses the messages or cannot cope with them.
        """
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            own = {"messages": given, "tools": tools, "add_generation_prompt": add_generation_prompt}
            return self._template.render({"documents": None, **variables, **self._variables, **own})
        except _ERRORS as error:
            raise ChatTemplateError(f"the chat template cannot render these messages: {error}") from error


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: what the model is trained to say, which renders as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
