"""The engine whose arithmetic is replaced, by which the host's time is measured, goes on like any other."""

from __future__ import annotations

import pytest

from benchmarks.host_time import measure


@pytest.mark.usefixtures("smollm2_path")
def test_vocabularies_draft_what_is_accepted_where_no_network_computes() -> None:
    vocabularies = ["none", "full", "dynamic:512+512"]
    results, _ = measure("smollm2-135m", vocabularies, batch=2, k=2, steps=10, profiled=False)
    assert [one.vocabulary for one in results] == vocabularies
    without, *drafting = results
    assert (without.tokens_each, without.first_accepted) == (1.0, None)
    assert all(one.tokens_each > 1.2 and one.first_accepted for one in drafting)
