"""Which replica Envoy sends a session to: its ring of hashes, and its bound on what one replica has in work."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

DEFAULT_RING_SIZE = 1024
"""Envoy's ``minimum_ring_size``."""
_LARGEST_RING = 8 * 1024**2
_BALANCE = 1.5
"""``hash_balance_factor`` / 100 in deploy/envoy/envoy.yaml."""


class Router(Protocol):
    """Chooses replicas by number."""

    def choose(self, session: str, active: Sequence[int]) -> int:
        """For a request of ``session``, given the requests that each replica has in work."""
        ...


def hashes_each(num_hosts: int, ring_size: int) -> int:
    """How many places each of some hosts of equal weight has on a ring."""
    return min(math.ceil(ring_size / num_hosts), max(_LARGEST_RING // num_hosts, 1))


def shares(num_hosts: int, ring_size: int, seed: int = 0) -> list[float]:
    """What share of all sessions each host gets, times the number of hosts; sorted."""
    each = hashes_each(num_hosts, ring_size)
    places = np.random.default_rng(seed).random(num_hosts * each)
    order = np.argsort(places)
    gaps = np.diff(places[order], prepend=places[order[-1]] - 1.0)
    return sorted(map(float, np.bincount(order // each, gaps, num_hosts) * num_hosts))


class Ring:
    """The ring of hosts with these addresses. A session's host is that of the next place after the session's hash."""

    def __init__(self, addresses: Sequence[str], ring_size: int = DEFAULT_RING_SIZE) -> None:
        each = hashes_each(len(addresses), ring_size)
        places = sorted(
            (_hash(f"{address}_{number}"), host) for host, address in enumerate(addresses) for number in range(each)
        )
        self._hashes = [place for place, _ in places]
        self._hosts = [host for _, host in places]

    def home(self, session: str) -> int:
        """The host of a session while it has room."""
        return self._hosts[bisect_left(self._hashes, _hash(session)) % len(self._hosts)]

    def choose(self, session: str, active: Sequence[int]) -> int:
        return with_room(self.home(session), session, active)


class Drawn:
    """Hosts that get these shares of the sessions: some of a ring too large to be built."""

    def __init__(self, host_shares: Sequence[float]) -> None:
        self._shares = host_shares

    def choose(self, session: str, active: Sequence[int]) -> int:
        [home] = random.Random(session).choices(range(len(self._shares)), self._shares)
        return with_room(home, session, active)


class Anywhere:
    """Any host for any request: no affinity."""

    def __init__(self, num_hosts: int, seed: int = 0) -> None:
        self._num_hosts, self._chance = num_hosts, random.Random(seed)

    def choose(self, session: str, active: Sequence[int]) -> int:
        return self._chance.randrange(self._num_hosts)


def with_room(home: int, session: str, active: Sequence[int]) -> int:
    """The host itself, or where it has more than its bound the first with room, always in the session's own order."""
    total = math.ceil(_BALANCE * (sum(active) + 1))
    slots = max(math.ceil(total / len(active)), 1)
    if active[home] <= slots:
        return home
    order = random.Random(session).sample(range(len(active)), len(active))
    return next((host for host in order if active[host] <= slots), min(order, key=active.__getitem__))


def _hash(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())
