"""The options of the API server, subject by subject."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from evospec.engine.adapters_config import RedisUrl
from evospec.engine.options import Section

KEY_HASH = re.compile(r"[0-9a-f]{64}")
"""Of an API key: its SHA-256."""


def _check_hash(value: str) -> str:
    if not KEY_HASH.fullmatch(value):
        # The value itself stays out of the message: it may be a key put here by mistake.
        raise ValueError("must be the 64 hexadecimal digits that `evospec keys new` prints, not the key")
    return value


KeyHash = Annotated[str, AfterValidator(_check_hash)]


def _check_key(value: str) -> str:
    if not re.fullmatch(r"[!-~]+", value):
        raise ValueError("must be letters, digits and signs of ASCII, without spaces")
    return value


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#:@A-Z\[\]]+)(:[0-9]{1,5})?")


def _check_origin(value: str) -> str:
    if not _ORIGIN.fullmatch(value):
        raise ValueError(f"must be * or as browsers send it, scheme://host[:port] in small letters, not {value!r}")
    return value


class HttpConfig(Section):
    """The API server."""

    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0: any free one."""
    metrics_address: str | None = Field(default=None, pattern=r"^.+:[0-9]{1,5}$")
    """HOST:PORT of a second listener, which answers /metrics and /health without keys; default: none. What it shows
    names all tenants, so only operators may reach it."""
    strict: bool = False
    """Refuse what is ignored or capped otherwise: fields that cannot change an answer, and max_tokens beyond the
    context."""
    allowed_origins: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Origins whose web pages may call the API from a browser, as https://example.org, or * for all; default: none."""
    max_body_bytes: int = Field(default=4 * 1024**2, gt=0)
    """Largest request body in bytes."""
    max_header_bytes: int = Field(default=64 * 1024, gt=0)
    """Largest request line and headers in bytes; more gets a 431."""
    header_timeout: float = Field(default=10.0, gt=0)
    """Seconds that a connection has to send a request's headers."""
    body_timeout: float = Field(default=120.0, gt=0)
    """Most seconds that a request's body may take to arrive, of those in which the server is ready for it; less than 1
    KB/s after the first ten is too slow in any case. A late one gets a 408."""
    keep_alive_timeout: int = Field(default=75, gt=0)
    """Seconds that an idle connection stays open; more than a load balancer in front keeps its own."""
    max_address_share: float = Field(default=0.25, gt=0, le=1)
    """Share of all connections that one client address (of IPv6 a /64 network) may hold; 1 where all clients come
    through one proxy."""
    drain_delay: float = Field(default=0.0, ge=0)
    """Seconds after SIGTERM in which requests are still taken, while /health is 503 already: behind a load balancer, a
    little more than it takes to notice that."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Seconds that running requests get to finish after SIGTERM."""
    engine_timeout: float = Field(default=60.0, gt=0)
    """Seconds without a heartbeat after which the engine counts as dead. It reports between steps, and one step of a
    large model on a CPU takes tens of seconds. An engine that dies is noticed at once."""
    engine_hang_timeout: float = Field(default=300.0, gt=0)
    """Seconds without a heartbeat after which `evospec serve` kills the engine and starts it again; more than its
    longest step, or it is killed at work, again and again."""


class LogConfig(Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level shown."""
    format: Literal["json", "console"] = "json"
    """JSON lines, or text for people."""


class TracingConfig(Section):
    """Traces of OpenTelemetry; they need `pip install 'evospec[tracing]'`."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """URL of a collector that takes OTLP over HTTP, as http://127.0.0.1:4318/v1/traces. It gets a span for each
    request, with figures but no text. Default: none."""


class RedisConfig(Section):
    """Redis or Valkey; holds the rate limits and the sessions."""

    url: RedisUrl | None = None
    """redis://, rediss:// (TLS) or unix:// URL; for Sentinels or a cluster see docs/fleet.md. Default: an embedded
    Valkey, in memory only."""
    timeout: float = Field(default=0.25, gt=0)
    """Longest wait for one operation in seconds."""
    retry_interval: float = Field(default=1.0, gt=0)
    """Seconds between attempts while Redis is down; requests do not wait for them."""


class AuthConfig(Section):
    """API keys. Without any, everyone is the tenant "default", and only loopback addresses are served."""

    api_key: Annotated[str, AfterValidator(_check_key)] | None = None
    """One key for everybody, who is the tenant "default". Others on this machine see flags, so better set
    EVOSPEC_AUTH__API_KEY."""
    keys_file: Path | None = None
    """TOML file of tenants and hashes of their keys."""
    keys: str | None = None
    """Further keys as TENANT=HASH, separated by commas (for containers)."""
    admin_key: KeyHash | None = None
    """Hash of the key for /v1/adapters, as `evospec keys new` prints it; default: nobody may."""
    metrics_tenant: str = "prometheus"
    """Whose keys may read /metrics, which shows all tenants, where there are keys."""
    insecure: bool = False
    """Serve without keys on an address that is not loopback."""


class LimitsConfig(Section):
    """Rate limits of a tenant that the keys file gives none of its own."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute; default: no limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and output tokens a minute; default: no limit."""
    when_redis_is_down: Literal["local", "closed"] = "local"
    """local: each API server limits what it serves itself; closed: refuse limited tenants with 503."""


class SessionsConfig(Section):
    """What is kept between the requests of a session; see docs/sessions.md."""

    ttl_seconds: int = Field(default=24 * 3600, ge=1)
    """Seconds a session lives after its last use, unless it was made with others."""
    max_ttl_seconds: int = Field(default=30 * 24 * 3600, ge=1)
    """Most seconds a client may ask for."""
    max_per_tenant: int = Field(default=1000, ge=1)
    """Most sessions of a tenant, of up to 72 KiB each; of more, those used longest ago are forgotten."""
    from_user: bool = True
    """Requests without a session id have one for each value of OpenAI's `user`."""


class ResponsesConfig(Section):
    """What /v1/responses keeps, so that a request can go on from an earlier answer; see docs/api.md."""

    ttl_seconds: int = Field(default=24 * 3600, ge=1)
    """Seconds that a conversation is kept."""
    max_bytes_per_tenant: int = Field(default=16 * 1024**2, ge=0)
    """Most bytes of a tenant's conversations, of which there are at most 1,000; of more, the oldest are forgotten. 0:
    none is kept."""
