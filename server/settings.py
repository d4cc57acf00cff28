"""One tree of options for all processes.

Every option can be given as a flag (``--http.port 9000``), an environment variable
(``EVOSPEC_HTTP__PORT=9000``) or a line in a TOML file (``--config FILE``), in this order of precedence.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    CLI_SUPPRESS,
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from evospec.engine.config import EngineConfig
from evospec.engine.options import Section
from evospec.server.options import (
    AuthConfig,
    HttpConfig,
    LimitsConfig,
    LogConfig,
    RedisConfig,
    ResponsesConfig,
    SessionsConfig,
    TracingConfig,
)

ENV_PREFIX = "EVOSPEC_"
SHORTCUTS = {
    "engine.model.name": "model",
    "engine.model.served_name": "served-model-name",
    "engine.model.max_model_len": "max-model-len",
    "engine.speculation.draft": "draft",
    "engine.cache.max_bytes": "kv-max-bytes",
    "engine.scheduler.max_num_seqs": "max-num-seqs",
    "engine.runtime.tensor_parallel_size": "tensor-parallel-size",
    "engine.alignment.enabled": "alignment.enabled",
    "http.host": "host",
    "http.port": "port",
    "http.allowed_origins": "allowed-origins",
    "http.strict": "strict",
    "tracing.endpoint": "otlp-traces-endpoint",
    "auth.api_key": "api-key",
    "auth.keys_file": "keys-file",
    "auth.insecure": "insecure",
}
NO_VARIABLES_OF_OURS = {"port", "api-key"}
"""Short flags whose names others use in the environment: Kubernetes for a service "evospec", and our own clients."""


class ConfigurationError(Exception):
    """The options given cannot work; the message is one line for the operator."""


class _ConfigFileSource(InitSettingsSource):
    """The TOML file that the flags or the environment name as ``config``."""

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            return tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"cannot read the configuration file {path}: {error}") from error


class Settings(BaseSettings):
    """All options of EvoSpec."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        cli_prog_name="evospec",
        cli_exit_on_error=False,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_shortcuts=SHORTCUTS,
    )

    config: Path | None = Field(default=None, description="TOML file with any of these options.")
    http: HttpConfig = Field(default_factory=HttpConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    redis: RedisConfig = Field(default_factory=RedisConfig)
    sessions: SessionsConfig = Field(default_factory=SessionsConfig)
    responses: ResponsesConfig = Field(default_factory=ResponsesConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFileSource(settings_cls, {})


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The options and sections of a section, but those that are set in code only."""
    hidden = model.in_code_only if issubclass(model, Section) else frozenset()
    return {name: field for name, field in model.model_fields.items() if name not in hidden}


def sections(
    model: type[BaseModel] = Settings, path: str = ""
) -> Iterator[tuple[str, type[BaseModel], dict[str, FieldInfo]]]:
    """``model`` and all sections in it, each with its name in the tree and its options by theirs."""
    options: dict[str, FieldInfo] = {}
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in fields_of(model).items():
        full_name, kind = f"{path}.{name}" if path else name, field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((kind, full_name))
        else:
            options[full_name] = field
    yield path, model, options
    for section in inner:
        yield from sections(*section)


def all_options() -> dict[str, FieldInfo]:
    """Every option of the tree by its name."""
    return {name: field for _, _, options in sections() for name, field in options.items()}


for _path, _section, _options in sections():
    for _name in _section.model_fields.keys() - fields_of(_section).keys():
        _section.model_fields[_name].metadata.append(CLI_SUPPRESS)  # not in --help


def load_settings(arguments: Sequence[str] = (), *, experiments: bool = False) -> Settings:
    """Settings from flags, environment and configuration file.

    Raises ``ConfigurationError`` with one line that names the option at fault. ``experiments``: those that are set in
    code only are known, too.
    """
    _check_environment()
    try:
        settings = Settings(_cli_parse_args=list(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigurationError(f"unknown option: {option}") from error
        if first["type"] == "value_error":  # from a validator of ours; the value may be a secret
            raise ConfigurationError(f"{option}: {first['msg']}") from error
        raise ConfigurationError(f"{option}: {first['msg']} (got {first['input']!r})") from error
    except SettingsError as error:
        raise ConfigurationError(" ".join(str(error).removeprefix("error parsing CLI: ").split())) from error
    if not experiments:
        _check_known(settings, [])
    return settings


def _check_known(model: BaseModel, path: list[str]) -> None:
    """What is set in code only was not set here."""
    for name in model.model_fields_set:
        if name not in fields_of(type(model)):
            raise ConfigurationError(f"unknown option: {'.'.join([*path, name])}")
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            _check_known(value, [*path, name])


def _check_environment() -> None:
    """Variables that would be ignored silently are refused.

    They are of no section, have one underscore between names, or are named after a short flag. Others may have our
    prefix for other reasons: Kubernetes names variables after services.
    """
    short = {_variable(flag): _variable(name) for name, flag in SHORTCUTS.items() if flag not in NO_VARIABLES_OF_OURS}
    meant = short | {_variable(name).replace("__", "_"): _variable(name) for name in all_options()}
    for variable in os.environ:
        if (option := meant.get(variable, variable)) != variable:
            raise ConfigurationError(f"unknown option in the environment: {variable} (did you mean {option}?)")
        section, nested, _ = variable.removeprefix(ENV_PREFIX).partition("__")
        if variable.startswith(ENV_PREFIX) and nested and section.lower() not in Settings.model_fields:
            raise ConfigurationError(f"unknown option in the environment: {variable}")


def _variable(option: str) -> str:
    """The variable in the environment of the option or flag ``option``."""
    return ENV_PREFIX + option.replace(".", "__").replace("-", "_").upper()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; names other than ``localhost`` count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
