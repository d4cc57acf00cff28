from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi import Depends, FastAPI
from structlog.testing import capture_logs

from evospec.engine.models.config import ModelError
from evospec.server.errors import install_error_handlers
from evospec.server.launcher import serve
from evospec.server.options import AuthConfig, LimitsConfig
from evospec.server.settings import ConfigurationError, load_settings
from evospec.server.tenants import KEY_PREFIX, Tenant, TenantRegistry, authenticate, check_exposure, hash_key, new_key

# Like those of new_key, and the same in every run: they are in the names of tests.
ACME_KEY, OTHER_KEY = (f"{KEY_PREFIX}{letter * 43}" for letter in "ab")
NO_LIMITS = LimitsConfig()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[tenants.acme]\nkeys = ["{hash_key(ACME_KEY)}"]\ntokens_per_minute = 100\n'
        f'[tenants.other]\nkeys = ["{hash_key(OTHER_KEY)}"]\nlearn = false\n'
    )
    return path


def test_key_finds_its_tenant_with_its_limits(keys_file: Path) -> None:
    registry = TenantRegistry.from_settings(AuthConfig(keys_file=keys_file), LimitsConfig(requests_per_minute=7))
    assert registry.find(ACME_KEY) == Tenant(name="acme", requests_per_minute=7, tokens_per_minute=100)
    assert registry.find(OTHER_KEY) == Tenant(name="other", requests_per_minute=7, learn=False)


@pytest.mark.parametrize("key", [None, "", "evs-wrong", ACME_KEY[:-1], ACME_KEY + "x", hash_key(ACME_KEY), "é"])
def test_any_other_key_finds_nobody(keys_file: Path, key: str | None) -> None:
    assert TenantRegistry.from_settings(AuthConfig(keys_file=keys_file), NO_LIMITS).find(key) is None


def test_keys_from_the_environment_join_those_of_the_file(keys_file: Path) -> None:
    second, third = new_key(), new_key()
    auth = AuthConfig(keys_file=keys_file, keys=f"acme={hash_key(second)}, new={hash_key(third)}")
    registry = TenantRegistry.from_settings(auth, NO_LIMITS)
    assert registry.find(second) == registry.find(ACME_KEY)
    assert registry.find(third) == Tenant(name="new")


@pytest.mark.parametrize("where", ["file", "setting"])
def test_keys_that_are_none_are_refused(where: str, tmp_path: Path) -> None:
    """Whoever names a place for keys wants some: to serve everyone would be a surprise."""
    path = tmp_path / "keys.toml"
    path.write_text("[tenants]\n")
    auth = {"keys_file": path} if where == "file" else {"keys": ""}
    with pytest.raises(ConfigurationError, match="insecure"):
        TenantRegistry.from_settings(AuthConfig(**auth), NO_LIMITS)
    assert not TenantRegistry.from_settings(AuthConfig(insecure=True, **auth), NO_LIMITS).has_keys


def test_without_keys_everyone_is_the_default_tenant() -> None:
    registry = TenantRegistry.from_settings(AuthConfig(), LimitsConfig(tokens_per_minute=9))
    assert not registry.has_keys
    assert registry.find(None) == registry.find("whatever") == Tenant(name="default", tokens_per_minute=9)


@pytest.mark.parametrize(
    "text",
    [
        f'[tenants.acme]\nkeys = ["{ACME_KEY}"]\n',
        "[tenants.acme]\nkeys = []\n",
        "[tenants.acme]\n",
        f'[tenants."../x"]\nkeys = ["{hash_key(ACME_KEY)}"]\n',
        f'[tenants.acme]\nkeys = ["{hash_key(ACME_KEY)}"]\ntokens_per_minute = 0\n',
        f'[tenants.acme]\nkeys = ["{hash_key(ACME_KEY)}"]\ntoken_per_minute = 1\n',
        f'[tenants.a]\nkeys = ["{hash_key(ACME_KEY)}"]\n[tenants.b]\nkeys = ["{hash_key(ACME_KEY)}"]\n',
        "[tenants",
    ],
)
def test_bad_keys_file_is_an_error_that_shows_no_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        TenantRegistry.from_settings(AuthConfig(keys_file=path), NO_LIMITS)
    assert ACME_KEY not in str(caught.value)


@pytest.mark.parametrize("pairs", ["acme", f"acme={ACME_KEY}", f"={hash_key(ACME_KEY)}"])
def test_bad_keys_setting_is_an_error(pairs: str) -> None:
    with pytest.raises(ConfigurationError):
        TenantRegistry.from_settings(AuthConfig(keys=pairs), NO_LIMITS)


def test_missing_keys_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        TenantRegistry.from_settings(AuthConfig(keys_file=tmp_path / "none.toml"), NO_LIMITS)


def test_exposure_needs_keys_or_insecure(keys_file: Path) -> None:
    open_registry = TenantRegistry.from_settings(AuthConfig(), NO_LIMITS)
    with_keys = AuthConfig(keys_file=keys_file)
    with pytest.raises(ConfigurationError, match="API keys"):
        check_exposure("0.0.0.0", AuthConfig(), open_registry)
    check_exposure("127.0.0.1", AuthConfig(), open_registry)
    check_exposure("0.0.0.0", AuthConfig(insecure=True), open_registry)
    check_exposure("0.0.0.0", with_keys, TenantRegistry.from_settings(with_keys, NO_LIMITS))


@pytest.mark.parametrize(("options", "warns"), [([], True), (["--api-key", ACME_KEY], False)])
def test_a_server_without_keys_warns_of_a_clients_key_in_its_environment(
    options: list[str], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOSPEC_API_KEY", OTHER_KEY)
    with capture_logs() as lines, pytest.raises(ModelError):
        serve(load_settings(["--model", "/nowhere/model.gguf", *options]), with_engine=False)
    warnings = [str(line) for line in lines if line["log_level"] == "warning"]
    assert ["EVOSPEC_AUTH__API_KEY" in line for line in warnings] == [True] * warns
    assert OTHER_KEY not in str(lines)


def test_new_keys_are_long_and_distinct() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"evs-[\w-]{43}", key) for key in keys)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {ACME_KEY}", 200),
        (f"bearer  {ACME_KEY}", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Basic {ACME_KEY}", 401),
        (ACME_KEY, 401),
        ("Bearer wrong", 401),
    ],
)
async def test_authenticate(keys_file: Path, header: str | None, status: int) -> None:
    app = FastAPI()
    install_error_handlers(app)
    app.state.tenants = TenantRegistry.from_settings(AuthConfig(keys_file=keys_file), NO_LIMITS)

    @app.get("/")
    async def whoami(tenant: Annotated[Tenant, Depends(authenticate)]) -> str:
        return tenant.name

    headers = {} if header is None else {"Authorization": header}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.get("/", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["WWW-Authenticate"] == "Bearer"
