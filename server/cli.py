"""The ``evospec`` command."""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated

import typer

from evospec.engine.log import configure_logging
from evospec.engine.models.config import ModelError
from evospec.engine.validation import validated_files
from evospec.server.bench.command import bench
from evospec.server.chat_client import Conversation, chat
from evospec.server.command_line import check_flags, help_text, with_model_flag
from evospec.server.launcher import serve, validated_model
from evospec.server.model_list import model_list
from evospec.server.processes import ENGINE_COMMAND, WORKER_COMMAND, engine_environment, learn_where_possible
from evospec.server.remote import RemoteError
from evospec.server.settings import ConfigurationError, Settings, load_settings
from evospec.server.settings_doc import settings_doc
from evospec.server.tenants import CLIENT_KEY, check_tenant_name, hash_key, new_key

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
keys_app = typer.Typer(help="API keys.")
app.add_typer(keys_app, name="keys")
vocab_app = typer.Typer(help="Draft vocabularies.")
app.add_typer(vocab_app, name="vocab")


@app.callback(invoke_without_command=True)
def evospec(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """LLM inference server. To begin with: evospec serve"""
    if version:
        print(package_version("evospec"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# The options of these commands are the settings tree's, so typer passes all arguments on (--help too).
_SETTINGS_COMMAND = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("serve", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def serve_command(context: typer.Context) -> None:
    """Start everything: engine, API server and, without --redis.url, an embedded Valkey."""
    raise typer.Exit(serve(_load(context), with_engine=True))


@app.command("api", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def api_command(context: typer.Context) -> None:
    """Start the API server alone, for an engine at --engine.address."""
    raise typer.Exit(serve(_load(context), with_engine=False))


@app.command("engine", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def engine_command(context: typer.Context) -> None:
    """Start the engine alone, at --engine.address."""
    settings = _load(context)
    learn_where_possible(settings, validated_files(settings.engine))
    if settings.engine.address.startswith("ipc://"):
        Path(settings.engine.address.removeprefix("ipc://")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.execve(ENGINE_COMMAND[0], ENGINE_COMMAND, engine_environment(settings))


@app.command("worker", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def worker_command(context: typer.Context) -> None:
    """Start the adapters worker alone, for an engine on this machine."""
    settings = _load(context)
    if settings.engine.alignment.redis_url is None and settings.redis.url is None:
        raise ConfigurationError("redis.url is needed: the worker reads the engine's token log from there")
    validated_files(settings.engine)
    os.execve(WORKER_COMMAND[0], WORKER_COMMAND, engine_environment(settings))


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="Name in the registry, or Hugging Face hub id.")],
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept; default: as configured.")] = None,
) -> None:
    """Fetch a model's files, check them, and print where they are."""
    update = {"name": model} if cache_dir is None else {"name": model, "cache_dir": cache_dir}
    print(validated_model(load_settings().engine.model.model_copy(update=update)).path)


@app.command("list")
def list_command(
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept; default: as configured.")] = None,
) -> None:
    """Print the models that are known by name, and which of them have a draft and are fetched."""
    print(model_list(cache_dir or load_settings().engine.model.cache_dir))


@app.command("chat")
def chat_command(
    url: Annotated[str, typer.Argument(help="Of any server that speaks OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server has.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=CLIENT_KEY, help="If the server wants one.")] = None,
) -> None:
    """Talk with a model. See how many tokens a second it writes and, in a terminal, by colours what was drafted."""
    in_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    chat(Conversation(url, api_key, model), in_colours)


app.command("bench")(bench)


@app.command("settings-doc")
def settings_doc_command() -> None:
    """Print docs/configuration.md, made from the settings themselves."""
    print(settings_doc(), end="")


@keys_app.command("new")
def keys_new(tenant: Annotated[str, typer.Argument(help="Name of the tenant, as in the keys file.")]) -> None:
    """Make an API key: printed once, with the lines for the keys file, which holds only its hash."""
    name, key = check_tenant_name(tenant), new_key()
    print(f"key (give it to the tenant; it is stored nowhere):\n{key}\n")
    print(f'lines for the keys file:\n[tenants.{name}]\nkeys = ["{hash_key(key)}"]')


# The options of these are those of the programs that do the work, which load torch.
@vocab_app.command("build", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def vocab_build(context: typer.Context) -> None:
    """Count tokens and bigrams of a model's generated answers: speculation.vocabulary static:K and dynamic:K+S."""
    os.execv(sys.executable, [sys.executable, "-m", "evospec.adapters.training.count", *context.args])


@vocab_app.command("add-text", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def vocab_add_text(context: typer.Context) -> None:
    """Add a directory of text to the token counts of a model's draft."""
    os.execv(sys.executable, [sys.executable, "-m", "evospec.adapters.training.count_text", *context.args])


@app.command("train-draft", context_settings=_SETTINGS_COMMAND, add_help_option=False)
def train_draft(context: typer.Context) -> None:
    """Train an EAGLE-3 draft on a model's answers, which python -m evospec.adapters.training.generate MODEL makes."""
    os.execv(sys.executable, [sys.executable, "-m", "evospec.adapters.training.train", *context.args])


def main() -> None:
    """Entry point. Errors of configuration are one line, without a traceback, and exit status 2."""
    # As process 1 of a container it would ignore it, also while a model is fetched; what runs later has its own way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(app(standalone_mode=False))
    except (ConfigurationError, ModelError, RemoteError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"evospec: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _load(context: typer.Context) -> Settings:
    """The settings that a command's arguments ask for; ends here where they ask for help."""
    if {"--help", "-h"} & set(context.args):
        print(help_text(str(context.info_name), str(context.command.help)))
        raise typer.Exit
    arguments = with_model_flag(context.args)
    check_flags(arguments)
    settings = load_settings(arguments)
    configure_logging(settings.log.level, settings.log.format)
    return settings
