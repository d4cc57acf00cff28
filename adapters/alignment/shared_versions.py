"""What the servers of one draft tell each other through Redis: each key is learned by one of them, for all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import structlog
import torch
from redis.exceptions import LockError, ResponseError
from redis.lock import Lock
from safetensors import SafetensorError
from safetensors.torch import load, save

from evospec.engine.online.adapter_control import learned_key
from evospec.engine.online.weight_layout import WeightLayout
from evospec.engine.redis_clients import REDIS_FAILURES, connect

log = structlog.get_logger(__name__)

Unshared = Literal["version", "frozen", "reset"]
"""What other servers of a key are to be told: which version is in force, whether it is frozen, to forget it."""
_TIMEOUT = 2.0
_KEPT_SECONDS = 30 * 24 * 3600
_MOST_LEASES = 4096


class SharedKey(NamedTuple):
    """What the servers have agreed on for a key."""

    number: int
    """Of its last version; 0: there is none."""
    num_resets: int
    """Grows whenever an operator lets all that was learned be forgotten; 0: that never was."""
    is_frozen: bool | None
    """Whether the key learns no more; None: nobody has said so."""


class SharedVersion(NamedTuple):
    """What is to be in force for a key."""

    number: int
    tensors: dict[str, torch.Tensor] | None
    """None: the base draft."""
    fits: bool = True
    """Whether it is this draft's."""


class SharedVersions:
    """For each key a number that grows with every version, the last version's weights, what operators have commanded,
    and who learns it.

    Redis may be away at any time: then nobody leads, and nothing is known.

    Args:
        url: of a Redis or Valkey that the servers share.
        layout: of the weights. Servers with another draft, or other adapters, have other keys.
        lease_seconds: how long a key is a server's alone after it last asked for it.
    """

    def __init__(self, url: str, layout: WeightLayout, lease_seconds: float = 30.0) -> None:
        self._redis = connect(url, _TIMEOUT)
        self._layout, self._lease_seconds = layout, lease_seconds
        self._leases: dict[str, Lock] = {}
        """By key, the one asked for longest ago first. A lease that is left out here ends by itself."""

    def leads(self, key: str) -> bool:
        """Whether this server is the one that learns a key: it stays so while it asks more often than a lease lasts."""
        try:
            lease = self._leases.pop(key, None)
            if lease is None:
                lease = Lock(self._redis, f"{self._name(key)}:learner", self._lease_seconds, thread_local=False)
            self._leases[key] = lease
            if len(self._leases) > _MOST_LEASES:
                del self._leases[next(iter(self._leases))]
            try:
                return bool(lease.reacquire())
            except LockError:  # it was never this server's, or is no longer
                return bool(lease.acquire(blocking=False))
        except REDIS_FAILURES:
            return False

    def publish(self, key: str, tensors: Mapping[str, torch.Tensor] | None) -> int | None:
        """Let all servers have these weights, None: the base draft. Returns their number; None while Redis is away."""
        data = b"" if tensors is None else save({each: tensor.contiguous() for each, tensor in tensors.items()})
        return self._change(key, "number", {"weights": data})

    def freeze(self, key: str, is_frozen: bool) -> bool:
        """Let no server learn the key, or the one that leads again; whether Redis has taken it."""
        return self._change(key, "commands", {"frozen": int(is_frozen)}) is not None

    def reset(self, key: str) -> int | None:
        """Let all servers forget what was learned of a key. Returns the reset's number; None while Redis is away."""
        return self._change(key, "resets", {"weights": b"", "frozen": 0})

    def look(self, key: str) -> SharedKey | None:
        """What the servers have agreed on; None while Redis is away."""
        try:
            found = cast(list[bytes | None], self._redis.hmget(self._name(key), ["number", "resets", "frozen"]))
        except REDIS_FAILURES:
            return None
        number, resets, frozen = found
        return SharedKey(int(number or 0), int(resets or 0), None if frozen is None else frozen == b"1")

    def version(self, key: str) -> SharedVersion | None:
        """The last version; None while Redis is away."""
        try:
            found, data = cast(list[bytes | None], self._redis.hmget(self._name(key), ["number", "weights"]))
        except REDIS_FAILURES:
            return None
        number = int(found or 0)
        if not data:
            return SharedVersion(number, None)
        try:
            tensors = load(data)
            self._layout.check(tensors)
        except (SafetensorError, ValueError) as error:
            log.warning("a shared adapter is refused", key=key, number=number, reason=str(error))
            return SharedVersion(number, None, fits=False)
        return SharedVersion(number, tensors)

    def close(self) -> None:
        """Let another server learn at once."""
        for lease in self._leases.values():
            try:
                lease.release()
            except REDIS_FAILURES:
                continue  # not this server's, or Redis is away: the lease ends by itself
        self._redis.close()

    def _change(self, key: str, counted: str, values: Mapping[str, bytes | int]) -> int | None:
        """Set fields of a key, and count one up; returns what that is then, or None while Redis is away."""
        name = self._name(key)
        try:
            self._redis.set(learned_key(self._layout.name), 1, ex=_KEPT_SECONDS)
            with self._redis.pipeline(transaction=True) as pipeline:
                # From the clock on: where Redis has lost its data, no number is given twice.
                pipeline.hsetnx(name, counted, time.time_ns() // 1_000_000)
                pipeline.hincrby(name, counted, 1)
                pipeline.hset(name, mapping=dict(values))  # type: ignore[arg-type]
                pipeline.expire(name, _KEPT_SECONDS)
                return int(pipeline.execute()[1])
        except ResponseError as error:  # such as out of memory
            log.warning("Redis refuses what the servers share", key=key, reason=str(error))
            return None
        except REDIS_FAILURES:
            return None

    def _name(self, key: str) -> str:
        return f"evospec:adapter:{self._layout.name}:{{{hashlib.sha256(key.encode()).hexdigest()}}}"
