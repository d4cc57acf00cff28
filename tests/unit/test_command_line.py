"""The command line: a model without its flag, help, and one clear line for what cannot be."""

from __future__ import annotations

import pytest

from evospec.server import cli
from evospec.server.command_line import COMMON, check_flags, help_text, with_model_flag
from evospec.server.foreign_options import ADVICE
from evospec.server.options import AuthConfig, LimitsConfig
from evospec.server.settings import SHORTCUTS, ConfigurationError, all_options, load_settings
from evospec.server.tenants import TenantRegistry


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of ``evospec ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["evospec", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_options_of_vllm_mean_the_same() -> None:
    arguments = ["m.gguf", "--port", "9000", "--max-model-len", "100", "--served-model-name", "name", "--api-key", "k"]
    settings = load_settings(with_model_flag(arguments))
    assert settings.engine.model.name == "m.gguf"
    assert settings.engine.model.served_name == "name"
    assert settings.engine.model.max_model_len == 100
    assert (settings.http.port, settings.auth.api_key) == (9000, "k")
    assert with_model_flag(["--port", "9000"]) == ["--port", "9000"]


def test_an_api_key_is_the_default_tenants() -> None:
    tenants = TenantRegistry.from_settings(AuthConfig(api_key="secret"), LimitsConfig(requests_per_minute=5))
    tenant = tenants.find("secret")
    assert tenants.find("other") is None
    assert tenants.find(None) is None
    assert tenant is not None
    assert (tenant.name, tenant.requests_per_minute) == ("default", 5)


@pytest.mark.parametrize("key", ["", "two words", "clé"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_printed(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(["--api-key", key])
    assert "auth.api_key" in str(caught.value)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--modle", "--model"),
        ("--http.prot", "--http.port"),
        ("--max_model_len", "--max-model-len"),
        ("--max-model-length=5", "--max-model-len"),
        ("--max_num_seqs", "--max-num-seqs"),
        ("--no-strikt", "--no-strict"),
        ("--num-blocks", "--engine.cache.num_blocks"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_one_meant(flag: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown option {flag.partition('=')[0]} .did you mean {meant}.?"):
        check_flags([flag, "5"])


def test_options_of_vllm_and_llama_cpp_are_refused_with_all_that_stands_for_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", "a.gguf", "-c", "4096", "-np=4", "--api-key", "k", "--jinja", "--trust-remote-code"]
    assert run(monkeypatch, "serve", *arguments) == 2
    assert capsys.readouterr().err == (
        "evospec: unknown options -m (use --model), -c (use --max-model-len), -np (use --max-num-seqs), "
        "--jinja (leave it out: tools and thoughts are what the chat template makes them), "
        "--trust-remote-code (leave it out: no model's code is run); --help lists them\n"
    )


def test_options_that_stand_for_those_of_others_are_options() -> None:
    named = {word.rstrip(",") for advice in ADVICE.values() for word in advice.split() if word.startswith("--")}
    check_flags([*named])
    for option in ADVICE:
        with pytest.raises(ConfigurationError, match=f"unknown option {option} "):
            check_flags([option])


def test_every_option_is_known() -> None:
    check_flags([f"--{name}" for name in all_options()])
    check_flags([f"--{shortcut}" for shortcut in SHORTCUTS.values()])
    check_flags(["--http.port=5", "--engine.cache.max_bytes", "-5", "--no-insecure"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve"], "evospec: No such command 'srve'."),
        (["pull"], "evospec: Missing argument 'model'."),
        (["serve", "--nonsense"], "evospec: unknown option --nonsense; --help lists them"),
        (["serve", "a.gguf", "b.gguf"], "evospec: unrecognized arguments: b.gguf"),
        (["serve", "no-such-model"], "evospec: model 'no-such-model' is neither"),
        (["api", "--port", "many"], "evospec: http.port: Input should be a valid integer"),
    ],
)
def test_every_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "0.1.0\n"


def test_help_has_the_common_options_first_and_all_options_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "serve", "--help") == 0
    text = capsys.readouterr().out
    assert text == help_text("serve", (cli.serve_command.__doc__ or "")) + "\n"
    assert "Undefined" not in text, "a default that is found when the server starts"
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert shown[: len(COMMON)] == [f"--{SHORTCUTS.get(name, name)}" for name in COMMON]
    assert sorted(shown) == sorted(f"--{SHORTCUTS.get(name, name)}" for name in all_options())
    assert len(COMMON) <= 15
