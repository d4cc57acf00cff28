"""The engine's end of the adapter bank: which adapter drafts for whom, whatever becomes of the channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from evospec.engine.adapters_config import AdaptersConfig, TokenLogConfig
from evospec.engine.models.config import ModelError
from evospec.engine.online import adapters as eagle_adapters
from evospec.engine.online.adapters import BASE, Assignment
from evospec.engine.online.weight_channel import WeightWriter
from tests.unit.engine_bank import BUFFERS, DIRECTORIES, FINGERPRINT, WORD, Bank, request


def test_each_request_drafts_with_the_adapter_of_its_key(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    law, clinic, other = request("1", "law"), request("2", "clinic"), request("3", "other")
    assert bank.assign(law, clinic, other) == [BASE] * 3
    assert bank.engine.rows([law, law]) is None
    first, second = bank.publish(2, "law", 1.0), bank.publish(0, "clinic", 2.0)
    assert bank.assign(law, clinic, other) == [Assignment(2, "law", first), Assignment(0, "clinic", second), BASE]
    assert (bank.value(law), bank.value(clinic)) == (1.0, 2.0)
    rows = bank.engine.rows([other, other, clinic, law, law])
    assert rows is not None
    assert rows.slots.tolist() == [-1, -1, 0, 2, 2]
    assert bank.engine.versions == {"law": first, "clinic": second}


def test_new_versions_take_the_place_of_old_ones_and_slots_can_be_emptied(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    law = request("1", "law")
    bank.publish(0, "law", 1.0)
    bank.assign(law)
    version = bank.publish(0, "law", 3.0)
    assert bank.value(law) == 1.0  # not before the next step
    assert bank.assign(law) == [Assignment(0, "law", version)]
    assert bank.value(law) == 3.0
    bank.writer.clear(0)
    assert bank.assign(law) == [BASE]
    version = bank.publish(0, "clinic", 4.0)
    assert bank.assign(law, request("2", "clinic")) == [BASE, Assignment(0, "clinic", version)]


def test_domains_have_their_own_where_the_key_says_so(tmp_path: Path) -> None:
    bank = Bank(tmp_path, key_scope="tenant+domain")
    version = bank.publish(0, "law/contracts", 1.0)
    requests = request("1", "law", "contracts"), request("2", "law"), request("3", "clinic", "contracts")
    assert bank.assign(*requests) == [Assignment(0, "law/contracts", version), BASE, BASE]


def test_control_requests_keep_the_base_draft(tmp_path: Path) -> None:
    bank = Bank(tmp_path, log=TokenLogConfig(control_share=0.2))
    bank.publish(0, "law", 1.0)
    requests = [request(str(number), "law") for number in range(1000)]
    for one, assignment in zip(requests, bank.assign(*requests), strict=True):
        assert (assignment == BASE) == bank.engine.is_control(one)
    assert 150 < sum(map(bank.engine.is_control, requests)) < 250


def test_damaged_weights_change_nothing_and_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
    bank = Bank(tmp_path)
    law, clinic, other = request("1", "law"), request("2", "clinic"), request("3", "other")
    good = bank.publish(0, "law", 1.0)
    bank.publish(1, "clinic", 5.0)
    bank.assign(law)
    bank.publish(0, "law", 2.0)
    bank.publish(1, "other", 6.0)
    healthy = bank.publish(2, "healthy", 7.0)
    bank.flip_bits(0, 1)
    expected = [Assignment(0, "law", good), BASE, BASE, Assignment(2, "healthy", healthy)]
    assert bank.assign(law, clinic, other, request("4", "healthy")) == expected
    assert bank.value(law) == 1.0
    assert bank.engine.num_failed_loads == 2
    bank.flip_bits(0, 1)
    assert bank.assign(law)[0].version > good
    assert bank.value(law) == 2.0
    assert bank.assign(other)[0].key == "other"


@pytest.mark.parametrize("start", [FINGERPRINT, WORD, DIRECTORIES, BUFFERS])
@pytest.mark.parametrize("is_seen", [False, True])
def test_a_damaged_channel_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, is_seen: bool
) -> None:
    """``is_seen``: the weights were taken over before the damage."""
    monkeypatch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
    bank = Bank(tmp_path)
    law = request("1", "law")
    before = bank.publish(0, "law", 1.0)
    if is_seen:
        bank.assign(law)
    with bank.config.channel_path.open("r+b") as file:
        file.seek(start)
        file.write(b"\x5a" * {DIRECTORIES: 1000, BUFFERS: 2 * bank.layout.nbytes}.get(start, 8))
    bank.assign(law)
    assert not bank.writer.is_replaced()  # it may be that a publication was on its way
    bank.assign(law)
    is_harmless = is_seen and start == BUFFERS
    assert bank.writer.is_replaced() != is_harmless
    if is_harmless:
        assert bank.value(law) == 1.0
        return
    assert bank.assign(law) == [BASE]
    bank.writer = WeightWriter(bank.config.channel_path, bank.layout, version=bank.writer.version)
    version = bank.publish(2, "law", 2.0)
    assert version > before
    assert bank.assign(law) == [Assignment(2, "law", version)]
    assert bank.value(law) == 2.0


def test_an_engine_that_comes_back_finds_its_adapters(tmp_path: Path) -> None:
    bank = Bank(tmp_path)
    version = bank.publish(1, "law", 1.0)
    bank.start()
    assert bank.assign(request("1", "law")) == [Assignment(1, "law", version)]


def weights(bank: Bank) -> dict[str, torch.Tensor]:
    """What the draft computes with."""
    return {name: weight.clone() for name, weight in bank.draft.named_parameters()}


def are(found: dict[str, torch.Tensor], value: float) -> bool:
    return all(bool((weight == value).all()) for weight in found.values())


def test_whole_drafts_take_the_place_of_the_base_and_give_it_back(tmp_path: Path) -> None:
    bank = Bank(tmp_path, is_whole=True, key_scope="global")
    base, anybody = weights(bank), request("1", "law")
    assert bank.assign(anybody) == [BASE]
    for value in (1.0, 2.0):
        version = bank.publish(0, "*", value)
        assert bank.assign(anybody, request("2", "clinic")) == [Assignment(0, "*", version)] * 2
        assert are(weights(bank), value)
        assert bank.engine.rows([anybody]) is None
    bank.writer.clear(0)
    assert bank.assign(anybody) == [BASE]
    found = weights(bank)
    assert all(torch.equal(found[name], weight) for name, weight in base.items())


def test_a_damaged_draft_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle_adapters, "_LOOK_SECONDS", 0.0)
    bank = Bank(tmp_path, is_whole=True, key_scope="global")
    anybody = request("1", "law")
    good = bank.publish(0, "*", 1.0)
    bank.assign(anybody)
    bank.publish(0, "*", 2.0)
    bank.flip_bits(0)
    assert bank.assign(anybody) == [Assignment(0, "*", good)]
    assert are(weights(bank), 1.0)
    bank.flip_bits(0)
    assert bank.assign(anybody)[0].version > good
    assert are(weights(bank), 2.0)


def test_what_the_engine_cannot_apply_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'q', 'k', 'v', 'o' or 'down'"):
        AdaptersConfig(enabled=True, targets=("q", "fc"))
    with pytest.raises(ModelError, match="key_scope global"):
        Bank(tmp_path, is_whole=True)
    with pytest.raises(ModelError, match="control_share 0"):
        Bank(tmp_path, is_whole=True, key_scope="global", log=TokenLogConfig(control_share=0.1))
