"""docs/configuration.md, made from the settings tree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from evospec.server.settings import SHORTCUTS, sections

_HEADER = """\
<!-- Made by `evospec settings-doc > docs/configuration.md`; do not edit. -->
# Configuration

`evospec serve`, `evospec api`, `evospec engine` and `evospec worker` take the same options. An option can be given in
three ways. The first one found counts:

1. a flag: `evospec serve --http.port 9000`
2. an environment variable, which is `EVOSPEC_` and the option in capitals with two underscores for each dot:
   `EVOSPEC_HTTP__PORT=9000`
3. a line in a TOML file, which `--config FILE` or `EVOSPEC_CONFIG` names:

   ```toml
   [http]
   port = 9000
   ```

In the environment and in files an option has its long name. A flag `--OPTION` switches it on and `--no-OPTION` off;
elsewhere it is `true` or `false`. A list is `a,b` as a flag, JSON in the environment
(`EVOSPEC_HTTP__ALLOWED_ORIGINS=["*"]`), and an array in a file.
"""


def settings_doc() -> str:
    tables = [_table(*section) for section in sections() if section[0]]
    return "\n".join([_HEADER, *filter(None, tables)])


def _table(path: str, model: type[BaseModel], options: Mapping[str, FieldInfo]) -> str:
    if not options:
        return ""
    head = "| option | default | meaning |\n|---|---|---|\n"
    rows = "".join(_row(option, field) for option, field in options.items())
    return f"## {path}\n{(model.__doc__ or '').strip()}\n\n{head}{rows}"


def _row(option: str, field: FieldInfo) -> str:
    flags = f"`--{option}`" + (f", `--{SHORTCUTS[option]}`" if option in SHORTCUTS else "")
    choices = [f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str | int)]
    meaning = " ".join((field.description or "").split()) + (f" One of {', '.join(choices)}." if choices else "")
    return f"| {flags} | {_default(field)} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=False)
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        return f"`~/{value.relative_to(Path.home())}`"
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
