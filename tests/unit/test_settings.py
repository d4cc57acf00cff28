from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import REGISTRY, registry_path
from evospec.server.cli import app
from evospec.server.settings import ConfigurationError, is_loopback, load_settings
from evospec.server.settings_doc import settings_doc

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "evospec.toml"
    path.write_text('[http]\nport = 1\n[engine.model]\nname = "from-file"\n[limits]\nrequests_per_minute = 5\n')
    return path


def test_defaults_work_without_anything() -> None:
    settings = load_settings()
    assert settings.http.host == "127.0.0.1"
    assert settings.redis.url is None
    assert "/tmp/" not in settings.engine.address


def test_flag_beats_environment_beats_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOSPEC_HTTP__PORT", "2")
    monkeypatch.setenv("EVOSPEC_ENGINE__MODEL__NAME", "from-environment")
    settings = load_settings(["--config", str(config_file), "--engine.model.name", "from-flag"])
    assert settings.engine.model.name == "from-flag"
    assert settings.http.port == 2
    assert settings.limits.requests_per_minute == 5


def test_config_file_can_be_named_by_the_environment(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOSPEC_CONFIG", str(config_file))
    assert load_settings().engine.model.name == "from-file"


def test_short_flags() -> None:
    settings = load_settings(["--model", "m", "--host", "::1", "--port", "0", "--kv-max-bytes", "4096", "--insecure"])
    assert settings.engine.model.name == "m"
    assert (settings.http.host, settings.http.port) == ("::1", 0)
    assert settings.engine.cache.max_bytes == 4096
    assert settings.auth.insecure


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--http.port", "many"], "http.port"),
        (["--port", "70000"], "http.port"),
        (["--engine.cache.block_size", "17"], "engine.cache.block_size"),
        (["--nonsense", "1"], "--nonsense"),
        (["--engine.alignment.training.horizon", "3"], "engine.alignment.training"),
        (["--engine.speculation.dynamic.prior", "off"], "engine.speculation.dynamic.prior"),
        (["--http.port"], "--http.port"),
        (["--engine.alignment.redis_url", "localhost:6379"], "engine.alignment.redis_url"),
        (["--config", "/nowhere/evospec.toml"], "/nowhere/evospec.toml"),
    ],
)
def test_errors_are_one_line_and_name_the_option(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "https://app.example.org",
        "http://localhost:3000",
        "http://[::1]:3000",
        "chrome-extension://abc",
        "tauri://a",
    ],
)
def test_origins_of_browsers(origin: str) -> None:
    assert load_settings(["--allowed-origins", f"{origin},https://b.org"]).http.allowed_origins[0] == origin


@pytest.mark.parametrize(
    "origin", ["https://app.example.org/", "app.example.org", "https://", "https://App.org", "https://a.org/x", "a:1"]
)
def test_what_no_browser_sends_as_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigurationError, match=r"http\.allowed_origins.*scheme://host\[:port\]"):
        load_settings(["--allowed-origins", origin])


@pytest.mark.parametrize("text", ["[http]\nprot = 1\n", "[htpp]\nport = 1\n", "[http\n"])
def test_mistakes_in_the_file_are_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError):
        load_settings(["--config", str(path)])


def test_misspelt_environment_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOSPEC_HTPP__PORT", "1")
    with pytest.raises(ConfigurationError, match="EVOSPEC_HTPP__PORT"):
        load_settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EVOSPEC_LIMITS_REQUESTS_PER_MINUTE", "EVOSPEC_LIMITS__REQUESTS_PER_MINUTE"),
        ("EVOSPEC_ENGINE_CACHE_MAX_BYTES", "EVOSPEC_ENGINE__CACHE__MAX_BYTES"),
        ("EVOSPEC_KEYS_FILE", "EVOSPEC_AUTH__KEYS_FILE"),
        ("EVOSPEC_MODEL", "EVOSPEC_ENGINE__MODEL__NAME"),
        ("EVOSPEC_HOST", "EVOSPEC_HTTP__HOST"),
        ("EVOSPEC_INSECURE", "EVOSPEC_AUTH__INSECURE"),
        ("EVOSPEC_ALIGNMENT__ENABLED", "EVOSPEC_ENGINE__ALIGNMENT__ENABLED"),
    ],
)
def test_an_underscore_too_few_or_a_short_flag_in_the_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigurationError, match=f"{variable} .*{meant}"):
        load_settings()


def test_variables_that_kubernetes_names_after_a_service_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "PORT", "PORT_8000_TCP_ADDR", "REDIS_SERVICE_HOST", "REDIS_PORT"):
        monkeypatch.setenv(f"EVOSPEC_{name}", "tcp://10.0.0.1:8000")
    load_settings()


def test_the_variable_with_the_key_of_clients_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOSPEC_API_KEY", "secret")
    assert load_settings().auth.api_key is None


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_configuration_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert page == settings_doc(), "run: evospec settings-doc > docs/configuration.md"


def test_every_option_has_a_description() -> None:
    assert "None |" not in settings_doc()


def test_a_key_in_the_place_of_its_hash_is_not_printed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(["--auth.admin_key", "evs-secret"])
    assert "auth.admin_key" in str(caught.value)
    assert "evs-secret" not in str(caught.value)


def test_pull_puts_a_model_where_the_servers_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelConfig] = []

    def validated(config: ModelConfig) -> ModelFiles:
        asked.append(config)
        return ModelFiles(config.name, tmp_path, "gguf")

    monkeypatch.setattr("evospec.server.cli.validated_model", validated)
    monkeypatch.setenv("EVOSPEC_ENGINE__MODEL__CACHE_DIR", str(tmp_path))
    assert CliRunner().invoke(app, ["pull", "smollm2-135m"]).exit_code == 0
    assert [(config.name, config.cache_dir) for config in asked] == [("smollm2-135m", tmp_path)]


def test_list_tells_what_is_fetched_and_has_a_draft(tmp_path: Path) -> None:
    path = registry_path("qwen2.5-coder-1.5b", tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()
    listed = CliRunner().invoke(app, ["list", "--cache-dir", str(tmp_path)]).stdout.splitlines()
    found = {name: answers for name, _, *answers in (line.split()[:4] for line in listed[1:])}
    assert found.keys() == REGISTRY.keys()
    assert found["smollm2-135m"] == ["yes", "no"]
    assert found["qwen2.5-coder-1.5b"] == ["no", "yes"]
