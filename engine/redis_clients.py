"""Clients of Redis or Valkey, made from a URL that says where it is and how it is run. Imports no torch.

    redis://HOST:PORT/DB, unix:///PATH            one server
    redis+sentinel://HOST:PORT,HOST:PORT/NAME     the primary that these Sentinels call NAME
    redis+cluster://HOST:PORT,HOST:PORT           a cluster; any of its nodes, which name the others

``rediss`` in place of ``redis`` is TLS; ``USER:PASSWORD@`` may stand before the hosts. What follows a ``?`` are options
of redis-py, such as ``ssl_ca_certs=/PATH``, and ``sentinel_username`` and ``sentinel_password``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.retry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import RedisClusterException, RedisError

REDIS_FAILURES = (RedisError, RedisClusterException, OSError)
"""What a client raises where Redis is away, or refuses."""

_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_PORTS = {"sentinel": 26379, "cluster": 6379}
_NODE_SHARE = 0.8
"""Of the time-out, so that a cluster's client itself sees that a node is gone, and looks for the one that took over."""


class _LateCluster:
    """A cluster's client that connects when it is first used: redis-py's own does so when it is made."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._client: redis.RedisCluster | None = None

    def __getattr__(self, name: str) -> Any:
        if self._client is None:
            self._client = redis.RedisCluster(**self._options)
        return getattr(self._client, name)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def check_url(url: str) -> str:
    """``url`` as it is; raises ``ValueError`` if no client can be made from it."""
    scheme = urlsplit(url).scheme
    if scheme not in _SCHEMES:
        raise ValueError(f"a Redis URL begins with one of {', '.join(f'{one}://' for one in _SCHEMES)}")
    if "+" not in scheme:
        parse_url(url)  # type: ignore[no-untyped-call]
        return url
    _, name, options = _parse(url)
    if scheme.endswith("sentinel") and not name:
        raise ValueError("the name of the primary is missing: redis+sentinel://HOST:PORT,HOST:PORT/NAME")
    if scheme.endswith("cluster") and (name or "db" in options):
        raise ValueError("a cluster has no databases")
    return url


def _parse(url: str) -> tuple[list[tuple[str, int]], str, dict[str, Any]]:
    """Of several servers: their hosts, for Sentinels the name of the primary, and options of redis-py without hosts."""
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    user, at, places = parts.netloc.rpartition("@")
    options = parse_url(f"{scheme}://{user}{at}?{parts.query}")  # type: ignore[no-untyped-call]
    options["ssl"] = options.pop("connection_class", None) is not None
    split = [urlsplit(f"//{place}") for place in places.split(",")]
    hosts = [(place.hostname or "", place.port or _PORTS[kind]) for place in split]
    if not all(host for host, _ in hosts):
        raise ValueError("a host is missing")
    return hosts, parts.path.strip("/"), options


def connect(url: str, timeout: float) -> redis.Redis:
    """A client that waits for no answer longer than ``timeout`` seconds, and tries nothing twice.

    It need not be one of ``Redis``, but has its commands; those with several keys want keys of one hash tag.
    """
    return cast(redis.Redis, _client(redis, _LateCluster, url, timeout))


def connect_async(url: str, timeout: float) -> redis.asyncio.Redis:
    """The same for asyncio."""
    return cast(redis.asyncio.Redis, _client(redis.asyncio, redis.asyncio.RedisCluster, url, timeout))


def _client(library: ModuleType, cluster: Any, url: str, timeout: float) -> Any:
    """``library``: redis or redis.asyncio, whose classes have the same names."""
    brief: dict[str, Any] = {"retry": library.retry.Retry(NoBackoff(), 0), "protocol": 2}
    scheme = urlsplit(url).scheme
    if "+" not in scheme:
        return library.Redis.from_url(url, **brief, **_waits(timeout))
    hosts, name, options = _parse(url)
    options |= brief
    if scheme.endswith("cluster"):
        nodes = [library.cluster.ClusterNode(*host) for host in hosts]
        return cluster(startup_nodes=nodes, **options, **_waits(timeout * _NODE_SHARE))
    theirs = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    theirs |= {name: value for name, value in options.items() if name.startswith("ssl")} | brief
    theirs |= _waits(timeout / (1 + len(hosts)))  # all of them are asked, one after the other
    return library.Sentinel(hosts, sentinel_kwargs=theirs, **options, **_waits(timeout)).master_for(name)


def _waits(seconds: float) -> dict[str, float]:
    return {"socket_timeout": seconds, "socket_connect_timeout": seconds}
