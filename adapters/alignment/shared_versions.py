"""What the servers of one draft tell each other through Redis: each key is learned by one of them, for all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from redis.exceptions import LockError
from redis.lock import Lock
from safetensors import SafetensorError
from safetensors.torch import load, save

from engine.online.adapter_control import learned_key
from engine.online.weight_layout import WeightLayout
from engine.redis_clients import REDIS_FAILURES, connect

log = structlog.get_logger(__name__)

_TIMEOUT = 2.0
_KEPT_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class SharedVersion:
    """What is to be in force for a key; ``tensors`` None: the base draft."""

    tensors: dict[str, torch.Tensor] | None


class SharedVersions:
    """A number for each key that grows with every version, the last version's weights, and who learns the key.

    Redis may be away at any time: then nobody leads, and nothing is new.

    Args:
        url: of a Redis or Valkey that the servers share.
        layout: of the weights. Servers with another draft, or other adapters, have other keys.
        lease_seconds: how long a key is a server's alone after it last asked for it.
    """

    def __init__(self, url: str, layout: WeightLayout, lease_seconds: float = 30.0) -> None:
        self._redis = connect(url, _TIMEOUT)
        self._layout, self._lease_seconds = layout, lease_seconds
        self._leases: dict[str, Lock] = {}
        self._known: dict[str, int] = {}
        """The number of the last version of each key that is in force here, or was refused."""

    def leads(self, key: str) -> bool:
        """Whether this server is the one that learns a key: it stays so while it asks more often than a lease lasts."""
        try:
            if key not in self._leases:
                name = f"{self._name(key)}:learner"
                self._leases[key] = Lock(self._redis, name, self._lease_seconds, thread_local=False)
            lease = self._leases[key]
            try:
                return bool(lease.reacquire())
            except LockError:  # it was never this server's, or is no longer
                return bool(lease.acquire(blocking=False))
        except REDIS_FAILURES:
            return False

    def publish(self, key: str, tensors: Mapping[str, torch.Tensor] | None) -> bool:
        """Let all servers have these weights, None: the base draft; whether Redis has taken them."""
        name = self._name(key)
        data = b"" if tensors is None else save({each: tensor.contiguous() for each, tensor in tensors.items()})
        try:
            self._redis.set(learned_key(self._layout.name), 1, ex=_KEPT_SECONDS)
            with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hincrby(name, "number", 1)
                pipeline.hset(name, "weights", data)
                pipeline.expire(name, _KEPT_SECONDS)
                self._known[key] = int(pipeline.execute()[0])
        except REDIS_FAILURES:
            return False
        return True

    def news(self, key: str) -> SharedVersion | None:
        """What another server has published since the last call, if anything that fits this draft."""
        name = self._name(key)
        try:
            published = self._redis.hget(name, "number")
            if published is None or int(published) == self._known.get(key):  # None: Redis may have lost it, too
                return None
            found: list[Any] = self._redis.hmget(name, ["number", "weights"])
        except REDIS_FAILURES:
            return None
        number, data = found
        if number is None:
            return None
        self._known[key] = int(number)
        if not data:
            return SharedVersion(None)
        try:
            tensors = load(data)
            self._layout.check(tensors)
        except (SafetensorError, ValueError) as error:
            log.warning("a shared adapter is refused", key=key, number=int(number), reason=str(error))
            return None
        return SharedVersion(tensors)

    def close(self) -> None:
        """Let another server learn at once."""
        for lease in self._leases.values():
            try:
                lease.release()
            except REDIS_FAILURES:
                continue  # not this server's, or Redis is away: the lease ends by itself
        self._redis.close()

    def _name(self, key: str) -> str:
        return f"evospec:adapter:{self._layout.name}:{{{hashlib.sha256(key.encode()).hexdigest()}}}"
