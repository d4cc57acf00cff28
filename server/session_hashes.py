"""Sessions as Redis holds them: a hash with a time to live for each, changed by scripts only.

Beside them, each tenant has a sorted set of the keys of its sessions by last use, so that it has no more of them than
``sessions.max_per_tenant``: whoever may send a request may make sessions.

Fields: ``incarnation``, drawn when the session is created; ``version``, drawn at every write of the snapshot;
``domain``; ``created`` in Unix seconds; ``ttl`` in seconds; ``snapshot``. A deleted session may leave a hash with
nothing but ``deleted``. Whatever else is found under a session's key is replaced, never trusted.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

from redis.commands.core import AsyncScript

from evospec.server.metrics import NO_DOMAIN
from evospec.server.redis_gate import RedisGate
from evospec.server.schemas.sessions import DOMAIN_PATTERN
from evospec.server.session_ids import sessions_key


@dataclass(frozen=True)
class OpenedHash:
    """A session as it was found or made.

    ``status`` "corrupt": what was there was no session, and this is a new one; "oversized": its snapshot was removed.
    ``snapshot`` is empty if there is none.
    """

    status: Literal["found", "created", "corrupt", "oversized"]
    incarnation: bytes
    version: bytes
    domain: str
    created: int
    ttl_seconds: int
    snapshot: bytes


@dataclass(frozen=True)
class Conflict:
    """A snapshot that was not written because another one was meanwhile: that one (or nothing) and its version."""

    version: bytes
    snapshot: bytes


class SessionHashes:
    """One round trip for each method. All raise ``RedisUnavailable``."""

    # Creates the session if there is none, and renews its time to live. Where the tenant has too many, those whose last
    # use is longest ago end (marks of deleted ones, too).
    #
    # KEYS[1] - hash of the session
    # KEYS[2] - sorted set of the tenant's sessions by last use
    # ARGV[1] - incarnation and version of a new session
    # ARGV[2] - domain of a new session
    # ARGV[3] - ttl of a new session
    # ARGV[4] - Unix seconds now
    # ARGV[5] - largest snapshot in bytes
    # ARGV[6] - most sessions of a tenant
    #
    # return {"deleted"} or {status, incarnation, version, domain, created, ttl, snapshot or nil}
    LUA_OPEN_SCRIPT = """
        local function is_number(text)
            return text and #text < 12 and string.find(text, '^[1-9]%d*$')
        end
        local fields = redis.pcall('HMGET', KEYS[1], 'deleted', 'incarnation', 'version', 'domain', 'created', 'ttl')
        if fields[1] then
            return {'deleted'}
        end
        fields[1] = 'found'
        if not (fields[2] and fields[3] and fields[4] and is_number(fields[5]) and is_number(fields[6])) then
            local existed = redis.call('DEL', KEYS[1])
            fields = {existed == 1 and 'corrupt' or 'created', ARGV[1], ARGV[1], ARGV[2], ARGV[4], ARGV[3]}
            redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'version', ARGV[1],
                       'domain', ARGV[2], 'created', ARGV[4], 'ttl', ARGV[3])
        end
        redis.call('EXPIRE', KEYS[1], fields[6])
        local time = redis.call('TIME')
        redis.call('ZADD', KEYS[2], time[1] + time[2] / 1000000, KEYS[1])
        if redis.call('TTL', KEYS[2]) < tonumber(fields[6]) then
            redis.call('EXPIRE', KEYS[2], fields[6])
        end
        local excess = math.min(100, redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[6]))
        if excess > 0 then
            local ended = redis.call('ZPOPMIN', KEYS[2], excess)
            for i = 1, #ended, 2 do
                redis.call('DEL', ended[i])
            end
        end
        if redis.call('HSTRLEN', KEYS[1], 'snapshot') > tonumber(ARGV[5]) then
            redis.call('HDEL', KEYS[1], 'snapshot')
            fields[1] = 'oversized'
        end
        fields[7] = redis.call('HGET', KEYS[1], 'snapshot')
        return fields
    """

    # KEYS[1] - hash of the session
    #
    # return {} if there is none, else {domain, created, seconds left to live}
    LUA_READ_SCRIPT = """
        local fields = redis.pcall('HMGET', KEYS[1], 'domain', 'created')
        if not (fields[1] and fields[2] and string.find(fields[2], '^%d+$')) then
            return {}
        end
        return {fields[1], fields[2], redis.call('TTL', KEYS[1])}
    """

    # KEYS[1] - hash of the session
    # KEYS[2] - sorted set of the tenant's sessions by last use
    # ARGV[1] - 1: leave a mark for as long as the session would have lived
    #
    # return 1 if there was a session, else 0
    LUA_DELETE_SCRIPT = """
        if redis.pcall('HEXISTS', KEYS[1], 'deleted') == 1 then
            return 0
        end
        local ttl = redis.call('TTL', KEYS[1])
        local existed = redis.call('DEL', KEYS[1])
        if ARGV[1] == '1' and ttl > 0 then
            redis.call('HSET', KEYS[1], 'deleted', 1)
            redis.call('EXPIRE', KEYS[1], ttl)
        else
            redis.call('ZREM', KEYS[2], KEYS[1])
        end
        return existed
    """

    # KEYS[1] - hash of the session
    # ARGV[1] - incarnation it must have
    # ARGV[2] - version it must have
    # ARGV[3] - new version
    # ARGV[4] - snapshot
    # ARGV[5] - ttl
    #
    # return {"saved"}, {"gone"} or {"conflict", version, snapshot or nil}
    LUA_WRITE_SCRIPT = """
        local fields = redis.pcall('HMGET', KEYS[1], 'incarnation', 'version')
        if fields[1] ~= ARGV[1] then
            return {'gone'}
        end
        if fields[2] ~= ARGV[2] then
            return {'conflict', fields[2], redis.call('HGET', KEYS[1], 'snapshot')}
        end
        redis.call('HSET', KEYS[1], 'version', ARGV[3], 'snapshot', ARGV[4])
        redis.call('EXPIRE', KEYS[1], ARGV[5])
        return {'saved'}
    """

    def __init__(self, gate: RedisGate, max_snapshot_bytes: int, max_sessions: int) -> None:
        self._gate = gate
        self._bounds = max_snapshot_bytes, max_sessions
        self._open_script = gate.redis.register_script(self.LUA_OPEN_SCRIPT)
        self._read_script = gate.redis.register_script(self.LUA_READ_SCRIPT)
        self._delete_script = gate.redis.register_script(self.LUA_DELETE_SCRIPT)
        self._write_script = gate.redis.register_script(self.LUA_WRITE_SCRIPT)

    async def open(self, key: str, domain: str, ttl_seconds: int) -> OpenedHash | None:
        """The session, living anew, or a new one with ``domain`` and ``ttl_seconds``; None if it was deleted."""
        now = int(time.time())
        reply = await self._run(self._open_script, key, _draw(), domain, ttl_seconds, now, *self._bounds)
        if len(reply) == 1:
            return None
        status, incarnation, version, stored, created, ttl, snapshot = reply
        domain = _checked_domain(stored)
        return OpenedHash(status.decode(), incarnation, version, domain, int(created), int(ttl), snapshot or b"")

    async def read(self, key: str) -> tuple[str, int, int] | None:
        """Domain, time of creation and seconds left to live; None if there is no such session."""
        reply = await self._run(self._read_script, key)
        return (_checked_domain(reply[0]), int(reply[1]), reply[2]) if reply else None

    async def delete(self, key: str, leave_mark: bool) -> bool:
        """Whether there was such a session. With a mark, ``open`` gives None for as long as it would have lived."""
        return bool(await self._run(self._delete_script, key, int(leave_mark)))

    async def write(
        self, key: str, incarnation: bytes, version: bytes, snapshot: bytes, ttl_seconds: int
    ) -> Literal["saved", "gone"] | Conflict:
        """Replace the snapshot of ``version``; "gone": the session that the request knew is no more."""
        reply = await self._run(self._write_script, key, incarnation, version, _draw(), snapshot, ttl_seconds)
        if reply[0] == b"conflict":
            return Conflict(reply[1] or b"", reply[2] or b"")
        return "saved" if reply[0] == b"saved" else "gone"

    async def _run(self, script: AsyncScript, key: str, *arguments: bytes | str | int) -> Any:
        return await self._gate.run(script([key, sessions_key(key)], arguments))


def _draw() -> str:
    """An incarnation or version that nobody else has drawn."""
    return secrets.token_hex(8)


def _checked_domain(stored: bytes) -> str:
    """A domain that came back from Redis; NO_DOMAIN if it is none."""
    domain = stored.decode("utf-8", "replace")
    return domain if re.fullmatch(DOMAIN_PATTERN, domain) else NO_DOMAIN
