"""What is read of a slot is what its last token left there, however steps and readers follow on each other."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evospec.engine.batch import Features
from evospec.engine.speculation.drafters.eagle_network import TorchEagleNetwork
from evospec.engine.speculation.drafters.kv import FeatureStore
from tests.tiny_drafts import random_draft
from tests.tiny_models import make_directory

NUM_SLOTS, WIDTH = 40, 8
CPU = torch.device("cpu")
steps = st.lists(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=30), max_size=20)


@settings(max_examples=60)
@given(steps, st.sets(st.integers(0, 19)))
def test_the_last_features_of_a_slot_count(written: list[list[int]], read_after: set[int]) -> None:
    """A step's slots differ; refused drafts' slots come again in the next."""
    store = FeatureStore(NUM_SLOTS, WIDTH, None, torch.float32, CPU)
    expected = torch.zeros(NUM_SLOTS + 1, WIDTH)
    for number, slots in enumerate(written):
        values = torch.randn(len(slots), WIDTH)
        store.add(Features(values, torch.tensor(slots, dtype=torch.int32)))
        expected[slots] = values
        if number in read_after:
            assert torch.equal(store.rows(torch.arange(NUM_SLOTS + 1)), expected)
    assert torch.equal(store.rows(torch.arange(NUM_SLOTS + 1)), expected)


def test_features_are_fused_once_for_many_steps(tmp_path: Path) -> None:
    """And as they would have been one by one."""
    draft, calls = random_draft(make_directory(tmp_path)), list[int]()

    class Counting(TorchEagleNetwork):
        def fuse_into(self, store: torch.Tensor, features: Features) -> None:
            calls.append(len(features.slots))
            super().fuse_into(store, features)

    network = Counting(draft, None)  # type: ignore[arg-type]
    hidden, inputs = draft.config.hidden_size, draft.fc.in_features
    store = FeatureStore(NUM_SLOTS, hidden, network, torch.float32, CPU)
    values = torch.randn(12, inputs)
    with torch.no_grad():
        for row in range(12):
            store.add(Features(values[row : row + 1], torch.tensor([row], dtype=torch.int32)))
        assert calls == []
        torch.testing.assert_close(store.rows(torch.arange(12)), draft.fuse(values))
    assert calls == [12]
