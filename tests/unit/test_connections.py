"""How many connections are let in, against plain counts of who holds how many."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from evospec.server.connections import ConnectionLimit

MOST, SHARE, OF_ONE = 8, 0.5, 4
ADDRESSES = {"10.0.0.1": 0, "10.0.0.2": 1, "2001:db8::1": 2, "2001:db8::ffff": 2, "2001:db8:0:1::1": 3, "": 4}
"""Addresses, and the client that each is."""


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(sorted(ADDRESSES))), max_size=60))
def test_no_client_holds_more_than_its_share_and_all_no_more_than_there_are(steps: list[tuple[bool, str]]) -> None:
    limit = ConnectionLimit(MOST, SHARE)
    held: list[str] = []
    for opens, address in steps:
        if opens:
            of_client = Counter(ADDRESSES[other] for other in held)[ADDRESSES[address]]
            fits = len(held) < MOST and of_client < OF_ONE
            assert limit.open(address) == fits
            held += [address] * fits
        elif address in held:
            held.remove(address)
            limit.close(address)


def test_a_share_is_at_least_one_connection() -> None:
    assert ConnectionLimit(2, 0.01).open("10.0.0.1")
