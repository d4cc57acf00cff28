"""Versions on disk: whole or not there, whatever happens between any two lines."""

from __future__ import annotations

import errno
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from evospec.adapters.alignment.store import AdapterStore, KeyState, claim
from evospec.engine.online.adapter_control import adapter_key
from evospec.engine.online.weight_layout import TensorSpec, WeightLayout
from tests.killable_processes import processes
from tests.unit.interleaving import at_line, before_each_line, count_lines

LAYOUT = WeightLayout((TensorSpec("a", (8, 4), torch.bfloat16), TensorSpec("b", (3,), torch.float32)), "draft")
CODE = "/adapters/alignment/store"


class Killed(BaseException):
    """The process ends here."""


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {spec.name: torch.full(spec.shape, value, dtype=spec.dtype) for spec in LAYOUT.tensors}


def die() -> None:
    raise Killed


def save_next(store: AdapterStore) -> None:
    state = store.load_state("key")
    state.good_revision = store.save(state, tensors(state.last_revision + 1))
    store.save_state(state)
    store.keep_only("key", {state.good_revision})


def test_a_store_killed_at_any_line_has_the_last_version_or_the_next(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, LAYOUT)
    save_next(store)
    lines = count_lines(CODE, lambda: save_next(store))
    for line in range(lines):
        before = store.load_state("key").good_revision
        with pytest.raises(Killed):
            before_each_line(CODE, at_line(line, die), partial(save_next, store))
        store = AdapterStore(tmp_path, LAYOUT)
        state = store.load_state("key")
        assert state.good_revision in (before, before + 1)
        loaded = store.load("key", state.good_revision)
        assert loaded is not None
        assert torch.equal(loaded["a"], tensors(state.good_revision)["a"])
    save_next(store)
    assert len(list(tmp_path.glob("key-*/revision-*.safetensors"))) == 1


def test_damaged_and_foreign_files_are_as_if_not_there(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, LAYOUT)
    save_next(store)
    assert AdapterStore(tmp_path, WeightLayout(LAYOUT.tensors, "other draft")).load("key", 1) is None
    assert AdapterStore(tmp_path, WeightLayout(LAYOUT.tensors, "other draft")).load_state("key").good_revision == 0
    [path] = tmp_path.glob("key-*/revision-1.safetensors")
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert store.load("key", 1) is None
    next(tmp_path.glob("key-*/state.json")).write_bytes(b"{")
    assert store.load_state("key") == KeyState("key")


def test_a_key_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path, LAYOUT)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert store.load_state("key") == KeyState("key")
    assert store.load("key", 1) is None


def test_quarantine_keeps_three(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, LAYOUT)
    state = KeyState("../../key")
    for _ in range(5):
        store.quarantine(state.key, store.save(state, tensors(1)))
    assert sorted(path.name for path in tmp_path.glob("*/quarantine/*")) == [
        f"revision-{n}.safetensors" for n in (3, 4, 5)
    ]
    assert store.load(state.key, 5) is None
    store.save_state(state)
    assert store.forget(state) == KeyState(state.key, last_revision=5)
    assert not list(tmp_path.glob("*/quarantine"))


def claim_and_wait(directory: Path, ours: Connection) -> None:
    ours.send(claim(directory))
    ours.recv()


def claimed_by_another_process(directory: Path) -> tuple[BaseProcess, Connection, Path]:
    """A process that has a directory until it is written to, and which."""
    ours, its = processes.Pipe()
    process = processes.Process(target=claim_and_wait, args=(directory, its), daemon=True)
    process.start()
    return process, ours, ours.recv()


def test_each_worker_of_a_machine_has_a_directory_of_its_own(tmp_path: Path) -> None:
    first, _, one = claimed_by_another_process(tmp_path / "draft")
    second, to_second, two = claimed_by_another_process(tmp_path / "draft")
    assert (one, two) == (tmp_path / "draft", tmp_path / "draft-2")
    first.kill()
    first.join()
    third, to_third, again = claimed_by_another_process(tmp_path / "draft")
    assert again == one
    for process, connection in ((second, to_second), (third, to_third)):
        connection.send(None)
        process.join()


def test_channel_version_outlives_a_restart(tmp_path: Path) -> None:
    assert AdapterStore(tmp_path, LAYOUT).channel_version == 0
    AdapterStore(tmp_path, LAYOUT).save_channel_version(7)
    assert AdapterStore(tmp_path, LAYOUT).channel_version == 7


def test_no_two_tenants_share_a_key() -> None:
    owners = [("a", "b/c"), ("a/b", "c"), ("a", None), ("a/", "b"), ("a", "/b"), ("*", None), ("a", "x" * 300)]
    owners += [("a", "x" * 299 + "y"), ("é", "ü"), ("a%2Fb", "c")]
    keys = [adapter_key("tenant+domain", *owner) for owner in owners]
    assert len(set(keys)) == len(owners)
    assert all(len(key.encode()) <= 128 for key in keys)
    assert "*" not in keys
    assert {adapter_key("global", *owner) for owner in owners} == {"*"}
    assert adapter_key("tenant", "a", "b") == adapter_key("tenant", "a", "c") == "a"
