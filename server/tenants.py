"""API keys and the tenants they belong to.

A key is 256 random bits, and only its SHA-256 is stored. A slow password hash would add nothing: nobody can
search 2^256 keys, however fast each guess is, and every request would pay for it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path

import structlog
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evospec.server.errors import ApiError
from evospec.server.options import KEY_HASH, AuthConfig, KeyHash, LimitsConfig
from evospec.server.settings import ConfigurationError, is_loopback

KEY_PREFIX = "evs-"
DEFAULT_TENANT = "default"
METRICS_PATH = "/metrics"
CLIENT_KEY = "EVOSPEC_API_KEY"
"""The environment variable with the key that ``evospec chat`` and ``evospec bench`` send."""
log = structlog.get_logger(__name__)

_TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Tenant(BaseModel):
    """Who a request is for. ``name`` labels metrics and salts caches; None means "no limit".

    ``learn``: whether adapters may learn from its text.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    learn: bool = True


class _TenantEntry(BaseModel):
    """One ``[tenants.NAME]`` table of the keys file; a limit left out is the server's default."""

    model_config = ConfigDict(extra="forbid")

    keys: list[KeyHash] = Field(min_length=1)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    learn: bool = True


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenants: dict[str, _TenantEntry]


class TenantRegistry:
    """Finds the tenant of an API key. Without keys everyone is the tenant ``default``.

    Where there are keys, ``metrics_tenant`` may read /metrics and do nothing else, and nobody else may read it.
    """

    def __init__(self, by_key_hash: Mapping[str, Tenant], default: Tenant, metrics_tenant: str) -> None:
        self._by_key_hash = dict(by_key_hash)
        self._default = default
        self._metrics_tenant = metrics_tenant

    @classmethod
    def from_settings(cls, auth: AuthConfig, limits: LimitsConfig) -> TenantRegistry:
        """Keys of the file and of the settings ``auth.keys`` and ``auth.api_key`` together.

        Raises ``ConfigurationError``.
        """
        default = Tenant(
            name=DEFAULT_TENANT,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
        )
        by_key_hash: dict[str, Tenant] = {}
        entries = _read_keys_file(auth.keys_file) if auth.keys_file else {}
        for name, entry in entries.items():
            overrides = entry.model_dump(exclude={"keys"}, exclude_none=True)
            tenant = default.model_copy(update={"name": check_tenant_name(name), **overrides})
            for key_hash in entry.keys:
                _add(by_key_hash, key_hash, tenant)
        known = {tenant.name: tenant for tenant in by_key_hash.values()}
        for name, key_hash in _parse_pairs(auth.keys or ""):
            tenant = known.get(name) or default.model_copy(update={"name": check_tenant_name(name)})
            _add(by_key_hash, key_hash, tenant)
        if auth.api_key is not None:
            _add(by_key_hash, hash_key(auth.api_key), known.get(DEFAULT_TENANT, default))
        if not by_key_hash and (auth.keys_file or auth.keys is not None) and not auth.insecure:
            raise ConfigurationError("the keys given are none, so everyone would be served: add one, or --insecure")
        return cls(by_key_hash, default, auth.metrics_tenant)

    @property
    def has_keys(self) -> bool:
        """Whether requests must carry a key."""
        return bool(self._by_key_hash)

    def find(self, key: str | None) -> Tenant | None:
        """The tenant of ``key``, or None if it is no key of ours.

        Compares with every hash in constant time, so that the time tells nothing about the hashes stored.
        """
        if not self.has_keys:
            return self._default
        key_hash = hash_key(key or "")
        found = None
        for known_hash, tenant in self._by_key_hash.items():
            if hmac.compare_digest(known_hash, key_hash):
                found = tenant
        return found

    def is_key(self, key: str | None) -> bool:
        """Whether ``key`` is that of a tenant."""
        return self.has_keys and self.find(key) is not None

    def check_permission(self, tenant: Tenant, path: str) -> None:
        """Raise 403 as ``ApiError`` if ``tenant`` may not use ``path``."""
        is_metrics, is_scraper = path == METRICS_PATH, tenant.name == self._metrics_tenant
        if not self.has_keys or is_metrics == is_scraper:
            return
        if is_metrics:
            raise ApiError(403, f"Metrics are for the tenant {self._metrics_tenant!r} (auth.metrics_tenant).")
        raise ApiError(403, f"The tenant {tenant.name!r} may read {METRICS_PATH} only (auth.metrics_tenant).")


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What the keys file holds instead of the key: SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_tenant_name(name: str) -> str:
    """``name``, if it can be a tenant's; raises ``ConfigurationError``."""
    if not _TENANT_NAME.fullmatch(name):
        raise ConfigurationError(f"tenant name {name!r}: use 1 to 63 of a-z, 0-9, '_' and '-'")
    return name


def check_exposure(host: str, auth: AuthConfig, tenants: TenantRegistry) -> None:
    """Refuse (``ConfigurationError``) to serve without keys where other machines can reach us."""
    if tenants.has_keys or auth.insecure or is_loopback(host):
        return
    raise ConfigurationError(
        f"refusing to listen on {host} without API keys: give --api-key KEY, --keys-file FILE (see `evospec keys new`) "
        "or --insecure"
    )


def warn_of_client_key(tenants: TenantRegistry) -> None:
    """Tell an operator who may take the clients' variable for the server's that nobody needs its key."""
    if os.environ.get(CLIENT_KEY) and not tenants.has_keys:
        log.warning(f"{CLIENT_KEY} is for clients only: set EVOSPEC_AUTH__API_KEY for this server to ask for a key")


def sent_key(request: Request) -> str | None:
    """The key that a request carries as ``Authorization: Bearer KEY``, else as ``X-Api-Key``."""
    if "authorization" not in request.headers:
        return request.headers.get("x-api-key")
    scheme, _, key = request.headers["authorization"].partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def authenticate(request: Request) -> Tenant:
    """The tenant of the key that a request carries.

    Raises ``ApiError``: 401 without a key of ours, 403 for one that is for something else.
    """
    registry: TenantRegistry = request.app.state.tenants
    tenant = registry.find(sent_key(request))
    if tenant is None:
        raise ApiError(401, "Missing or unknown API key: send 'Authorization: Bearer KEY'.", code="invalid_api_key")
    structlog.contextvars.bind_contextvars(tenant=tenant.name)
    registry.check_permission(tenant, request.scope["path"])
    return tenant


def is_admin(request: Request) -> bool:
    """Whether a request carries the admin key; False where there is none."""
    admin, key = request.app.state.settings.auth.admin_key, sent_key(request)
    return admin is not None and key is not None and hmac.compare_digest(hash_key(key), admin)


def _read_keys_file(path: Path) -> dict[str, _TenantEntry]:
    try:
        return _KeysFile.model_validate(tomllib.loads(path.read_text("utf-8"))).tenants
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys file {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"keys file {path}: {where}: {first['msg']}") from error


def _parse_pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, key_hash = item.partition("=")
        if not KEY_HASH.fullmatch(key_hash):
            raise ConfigurationError("auth.keys: expected TENANT=HASH, with the hash that `evospec keys new` prints")
        pairs.append((name, key_hash))
    return pairs


def _add(by_key_hash: dict[str, Tenant], key_hash: str, tenant: Tenant) -> None:
    other = by_key_hash.setdefault(key_hash, tenant)
    if other.name != tenant.name:
        raise ConfigurationError(f"tenants {other.name!r} and {tenant.name!r} have the same key")
