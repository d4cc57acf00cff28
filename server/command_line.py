"""Flags as people write them: the model without its flag, misspelt options, and what ``--help`` shows."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from evospec.server.foreign_options import ADVICE
from evospec.server.settings import SHORTCUTS, ConfigurationError, all_options, sections

COMMON = (
    *("engine.model.name", "engine.model.served_name", "engine.model.max_model_len", "http.host", "http.port"),
    *("auth.api_key", "auth.keys_file", "limits.requests_per_minute", "limits.tokens_per_minute"),
    *("engine.cache.max_bytes", "engine.scheduler.max_num_seqs", "http.strict", "http.allowed_origins"),
    *("engine.alignment.enabled", "config"),
)
"""What most people set; first in ``--help``."""

_INDENT = 6


def with_model_flag(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a model's name at the beginning has its flag, as ``evospec serve MODEL --port 9000``."""
    is_model = bool(arguments) and not arguments[0].startswith("-")
    return ["--model", *arguments] if is_model else [*arguments]


def check_flags(arguments: Sequence[str]) -> None:
    """Raise ``ConfigurationError`` if there are unknown options; it says of each what to give instead."""
    known = [flag for name, field in all_options().items() for flag in _flags(name, field)]
    whole = [f"--{path}" for path, _, _ in sections()]  # sections, as JSON
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    unknown = [flag for flag in flags if flag not in (*known, *whole) and not _is_number(flag)]
    if unknown:
        described = ", ".join(flag + _hint(flag, known) for flag in dict.fromkeys(unknown))
        raise ConfigurationError(f"unknown option{'s' * (len(unknown) > 1)} {described}; --help lists them")


def help_text(command: str, summary: str) -> str:
    """What ``evospec COMMAND --help`` shows: the common options first, then all others, subject by subject."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    known = all_options()
    lines = [f"usage: evospec {command} [MODEL] [OPTION ...]", "", *textwrap.wrap(summary, width), ""]
    lines += ["Common options:"]
    for name in COMMON:
        lines += _entry(name, known[name], width)
    lines += ["", "An option is also a line of the file that --config names, or a variable in the environment:"]
    lines += ["EVOSPEC_HTTP__PORT=9000 is --http.port 9000. --no-OPTION switches one off."]
    lines += ["docs/configuration.md has them all."]
    for path, section, options in sections():
        rest = {name: field for name, field in options.items() if name not in COMMON}
        if rest:
            about = " ".join((section.__doc__ or "").split())
            lines += ["", *textwrap.wrap(f"{path}: {about}", width)]
        for name, field in rest.items():
            lines += _entry(name, field, width)
    return "\n".join(lines)


def _entry(name: str, field: FieldInfo, width: int) -> list[str]:
    flag = f"--{SHORTCUTS.get(name, name)}"
    default: Any = field.get_default(call_default_factory=False)
    shown = "" if default in (None, (), PydanticUndefined) or isinstance(default, bool) else f" [{default}]"
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str | int)]
    meaning = f"{field.description}" + (f" One of {', '.join(choices)}." if choices else "")
    indent = " " * _INDENT
    return [f"  {flag}{shown}", *textwrap.wrap(meaning, width, initial_indent=indent, subsequent_indent=indent)]


def _flags(name: str, field: FieldInfo) -> Iterator[str]:
    for one in dict.fromkeys((name, SHORTCUTS.get(name, name))):
        yield f"--{one}"
        if field.annotation is bool:
            yield f"--no-{one}"


def _hint(flag: str, known: Sequence[str]) -> str:
    """In brackets what to give instead of an unknown option; empty if nobody knows."""
    if advice := ADVICE.get(flag):
        return f" ({advice})"
    return f" (did you mean {meant}?)" if (meant := _closest(flag, known)) else ""


def _closest(flag: str, known: Sequence[str]) -> str | None:
    """The known flag that is most like ``flag``, as a whole or in its last part."""
    candidates = {_plain(name): name for name in known}
    candidates |= {_plain(name.rpartition(".")[2]): name for name in known if "." in name} | candidates
    return next((candidates[name] for name in get_close_matches(_plain(flag), candidates, 1, 0.75)), None)


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def _is_number(text: str) -> bool:
    return text[1:2].isdigit()
