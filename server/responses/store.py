"""Conversations that requests may go on from, in Redis: one value for each response, which ends by itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from evospec.server.body_room import BodyRoom
from evospec.server.errors import ApiError
from evospec.server.options import ResponsesConfig
from evospec.server.redis_gate import RedisGate, RedisUnavailable, needs_redis

_ID = re.compile(r"resp_[0-9a-f]{32}")
_MOST_RESPONSES = 1000
"""Of a tenant: all of them are looked at when one is saved."""


class NoSuchResponse(ApiError):
    """The 404 for an id that is unknown, expired or another tenant's: the client cannot tell which."""

    def __init__(self, response_id: str) -> None:
        message = f"There is no stored response {response_id[:100]!r}."
        super().__init__(404, message, param="response_id", code="response_not_found")


class ResponseStore:
    """Keeps, for each stored response, the conversation that led to it and the answer.

    The tenant is in the key, so that an id means nothing to anybody else.
    """

    # Stores a conversation, unless it alone is too large. Where the tenant then has too much, the oldest end.
    #
    # KEYS[1] - the conversation
    # KEYS[2] - sorted set of the keys of the tenant's conversations, by time
    # ARGV[1] - the conversation's text
    # ARGV[2] - seconds to live
    # ARGV[3] - most bytes of a tenant
    # ARGV[4] - most conversations of a tenant
    #
    # return 1 if it is stored, else 0
    LUA_SAVE_SCRIPT = """
        if #ARGV[1] > tonumber(ARGV[3]) then
            return 0
        end
        local time = redis.call('TIME')
        redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
        redis.call('ZADD', KEYS[2], time[1] + time[2] / 1000000, KEYS[1])
        redis.call('EXPIRE', KEYS[2], ARGV[2])
        local bytes = 0
        for place, key in ipairs(redis.call('ZREVRANGE', KEYS[2], 0, -1)) do
            local length = redis.call('STRLEN', key)
            bytes = bytes + length
            if length == 0 or place > tonumber(ARGV[4]) or bytes > tonumber(ARGV[3]) then
                redis.call('DEL', key)
                redis.call('ZREM', KEYS[2], key)
            end
        end
        return 1
    """

    def __init__(self, gate: RedisGate, config: ResponsesConfig) -> None:
        self._gate = gate
        self._config = config
        self._room = BodyRoom(config.max_bytes_per_tenant)
        self._save = gate.redis.register_script(self.LUA_SAVE_SCRIPT)

    @property
    def keeps_any(self) -> bool:
        """Whether this server keeps conversations at all."""
        return self._config.max_bytes_per_tenant > 0

    @asynccontextmanager
    async def load(self, tenant: str, response_id: str) -> AsyncIterator[bytes]:
        """The conversation up to a response, with room for it as long as the block lasts.

        Raises ``NoSuchResponse``, and ``ApiError``: 503 if Redis is down or too many requests wait for room.
        """
        key, redis = _key(tenant, response_id), self._gate.redis
        with _needs_redis():
            size = await self._gate.run(redis.strlen(key))
        if not 0 < size <= self._config.max_bytes_per_tenant:
            raise NoSuchResponse(response_id)
        async with self._room.hold(tenant, size):
            with _needs_redis():
                conversation = await self._gate.run(redis.get(key))
            if not isinstance(conversation, bytes):
                raise NoSuchResponse(response_id)
            yield conversation

    async def save(self, tenant: str, response_id: str, conversation: bytes) -> bool:
        """Keep a conversation; whether it is kept: not if Redis is down, or for one that is too large."""
        config = self._config
        arguments: list[bytes | int] = [conversation, config.ttl_seconds, config.max_bytes_per_tenant, _MOST_RESPONSES]
        try:
            return bool(await self._gate.run(self._save([_key(tenant, response_id), _keys(tenant)], arguments)))
        except RedisUnavailable:
            return False

    async def delete(self, tenant: str, response_id: str) -> None:
        """Forget a conversation at once. Raises ``NoSuchResponse``, and ``ApiError``: 503 if Redis is down."""
        with _needs_redis():
            existed = await self._gate.run(self._gate.redis.delete(_key(tenant, response_id)))
        if not existed:
            raise NoSuchResponse(response_id)


_needs_redis = partial(needs_redis, "Stored responses cannot be reached at the moment.", code="responses_unavailable")


def _keys(tenant: str) -> str:
    return f"evospec:responses:{{{hashlib.sha256(tenant.encode()).hexdigest()[:32]}}}"  # one node of a cluster


def _key(tenant: str, response_id: str) -> str:
    if not _ID.fullmatch(response_id):
        raise NoSuchResponse(response_id)
    return f"{_keys(tenant)}:{response_id}"
