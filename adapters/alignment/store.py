"""Versions on disk, so that a restart goes on from the last good one.

    <directory>/<name of the key>/state.json               revisions in force and good, counts
    <directory>/<name of the key>/revision-<n>.safetensors tensors as they are published, and what they belong to
    <directory>/<name of the key>/quarantine/              the last revisions that were taken back
    <directory>/<name of the key>/training/                of a draft that grows: weights and optimiser in training
    <directory>/channel.json                               the last version of the weight channel

Each file is written whole, then put in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evospec.engine.online.shared_file import lock_directory
from evospec.engine.online.weight_layout import WeightLayout

log = structlog.get_logger(__name__)

_MAX_QUARANTINED = 3


def claim(directory: Path) -> Path:
    """The first of ``directory``, ``directory-2``, ``directory-3`` and so on that no other worker has; it is made if it
    is not there.

    So several servers of one machine, or of one volume, each have their own. It is this process's until that ends.
    """
    names = (directory.name if number == 1 else f"{directory.name}-{number}" for number in count(1))
    return next(path for path in map(directory.with_name, names) if lock_directory(path) is not None)


@dataclass
class KeyState:
    """What is known of a key beside its weights. Revision 0 is the base draft."""

    key: str
    last_revision: int = 0  # newest number given to a revision; never given again
    good_revision: int = 0
    is_frozen: bool = False
    own_number: int = 0  # of the last version that other servers have from this one
    bad_number: int = 0  # of the last of the servers' versions that was taken back here
    num_resets: int = 0  # of the key, by operators, that were carried out here
    learns_after: float = 0.0  # what was logged before is not learned from; seconds of the epoch, by Redis's clock
    num_trained_positions: int = 0
    num_updates: int = 0
    num_published: int = 0
    num_refused: int = 0
    num_rolled_back: int = 0


class AdapterStore:
    """The versions of all keys of one draft.

    Args:
        directory: made if it is not there.
        layout: of the tensors; revisions of another layout or another base draft are as if not there.
    """

    def __init__(self, directory: Path, layout: WeightLayout) -> None:
        self._directory, self._layout = directory, layout
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load_state(self, key: str) -> KeyState:
        """What was saved last; a new state if nothing was, or the files were made for another draft."""
        try:
            state = msgspec.json.decode((self._of(key) / "state.json").read_bytes(), type=KeyState)
        except (OSError, ValueError):
            state = KeyState("")
        if state.key != key:
            return KeyState(key)
        if state.good_revision and self.load(key, state.good_revision) is None:
            state.good_revision = 0
        return state

    def save_state(self, state: KeyState) -> None:
        _write(self._of(state.key) / "state.json", msgspec.json.format(msgspec.json.encode(state), indent=1))

    def save(self, state: KeyState, tensors: Mapping[str, torch.Tensor]) -> int:
        """Keep weights as a new revision, whose number is returned."""
        self._layout.check(tensors)
        state.last_revision += 1
        metadata = {"key": state.key, "layout": self._layout.fingerprint.hex(), "base": self._layout.base}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _write(self._path(state.key, state.last_revision), save(contiguous, metadata))
        return state.last_revision

    def load(self, key: str, revision: int) -> dict[str, torch.Tensor] | None:
        """The weights of a revision; None if they are not there, damaged, or another draft's."""
        try:
            with safe_open(self._path(key, revision), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("layout") != self._layout.fingerprint.hex() or metadata.get("key") != key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._layout.check(tensors)
        except (OSError, SafetensorError, ValueError):
            return None
        return tensors

    def quarantine(self, key: str, revision: int) -> None:
        """Put a bad revision where nobody loads it; the last three stay for people to look at."""
        directory = self._of(key) / "quarantine"
        directory.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self._path(key, revision), directory / self._path(key, revision).name)
        for path in sorted(directory.iterdir(), key=_revision_of)[:-_MAX_QUARANTINED]:
            path.unlink()

    def keep_only(self, key: str, revisions: set[int]) -> None:
        """Delete all other revisions, those in quarantine not."""
        for path in self._of(key).glob("revision-*"):
            if _revision_of(path) not in revisions:
                path.unlink()

    def forget(self, state: KeyState) -> KeyState:
        """Delete all that was learned of a key; returns its new state, which is not saved."""
        shutil.rmtree(self._of(state.key), ignore_errors=True)
        return KeyState(
            state.key,
            last_revision=state.last_revision,
            own_number=state.own_number,
            bad_number=state.bad_number,
            num_resets=state.num_resets,
        )

    def checkpoint_directory(self, key: str) -> Path:
        """Where what is in training may be kept; it is deleted with the key."""
        return self._of(key) / "training"

    @property
    def channel_version(self) -> int:
        """The greatest version that ``save_channel_version`` was given."""
        with suppress(OSError, ValueError, TypeError):
            return int(json.loads((self._directory / "channel.json").read_bytes()))
        return 0

    def save_channel_version(self, version: int) -> None:
        _write(self._directory / "channel.json", json.dumps(version).encode())

    def _of(self, key: str) -> Path:
        """A readable start and a hash: keys may have any character, and any length."""
        readable = re.sub(r"[^a-z0-9_-]", "_", key.lower())[:40]
        return self._directory / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def _path(self, key: str, revision: int) -> Path:
        return self._of(key) / f"revision-{revision}.safetensors"


def _revision_of(path: Path) -> int:
    match = re.fullmatch(r"revision-(\d+)\.safetensors", path.name)
    return int(match[1]) if match else 0  # what a killed worker was writing


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
