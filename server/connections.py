"""How many connections there may be: together, so that files stay for the engine and Redis, and of one address."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter

import prometheus_client
import structlog

log = structlog.get_logger(__name__)

REFUSED = prometheus_client.Counter(
    "evospec:connections_refused", "Connections closed at once because there were too many.", ["limit"]
)
for _limit in ("address", "all"):
    REFUSED.labels(_limit)  # shown as 0 from the start

_LOG_INTERVAL = 1.0
_IPV6_PREFIX = 64
"""Bits of an IPv6 address that stand for its client: who has one of its addresses has the whole network."""


class ConnectionLimit:
    """Counts open connections: ``most`` together, of which a client address may hold a share, but always one."""

    def __init__(self, most: int, address_share: float) -> None:
        self._most = most
        self._most_of_address = max(1, int(most * address_share))
        self._num_open = 0
        self._of_client: Counter[str] = Counter()
        self._logged = -_LOG_INTERVAL

    def open(self, address: str) -> bool:
        """Count a connection from ``address``; False if it is one too many, and then it is not counted."""
        client = _client(address)
        if self._of_client[client] >= self._most_of_address:
            self._note_refusal("address", client)
        elif self._num_open >= self._most:
            self._note_refusal("all", client)
        else:
            self._num_open += 1
            self._of_client[client] += 1
            return True
        return False

    def close(self, address: str) -> None:
        """Take back an ``open`` that returned True."""
        client = _client(address)
        self._num_open -= 1
        self._of_client[client] -= 1
        if not self._of_client[client]:
            del self._of_client[client]

    def _note_refusal(self, limit: str, client: str) -> None:
        REFUSED.labels(limit).inc()
        if time.monotonic() - self._logged >= _LOG_INTERVAL:
            self._logged = time.monotonic()
            log.warning("too many connections", limit=limit, client=client, open=self._num_open)


def _client(address: str) -> str:
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address.partition("%")[0], _IPV6_PREFIX), strict=False))
