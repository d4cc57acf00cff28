"""Broad text to count: what of a repository is taken, and that nothing near an evaluation prompt is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.prompts.broad_text import REPOSITORIES, Repository, documents_of, files_of, write
from benchmarks.prompts.build import read_eval, shingles
from benchmarks.prompts.sets import evaluation_shingles

PROMPT = next(prompt.passage for prompt in read_eval() if len(prompt.passage.split()) > 30)
QUOTED = "We read: " + " ".join(PROMPT.split()[5:25]).upper() + "!"


def make_repository(checkouts: Path, files: dict[str, bytes], paths: str = "") -> Repository:
    """A repository with one commit."""
    directory = checkouts / "owner" / "name"
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    git = ["git", "-C", str(directory), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    return Repository("owner/name", "HEAD", "MIT", paths)


def test_files_are_taken_by_their_paths(tmp_path: Path) -> None:
    """Names may have any character; pictures and what is too large to be prose are none of them."""
    files = {"a é.md": "größe".encode(), "b/c.md": b"c", "d.png": b"d", "e.md": b"\xff", "f.md": b"f" * 4 * 2**20}
    repository = make_repository(tmp_path, files, r"\.md$")
    assert dict(files_of(tmp_path, repository)) == {"a é.md": "größe", "b/c.md": "c"}


def test_a_missing_checkout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        list(files_of(tmp_path, REPOSITORIES[0]))


def test_what_a_document_is() -> None:
    lines = '{"prompt": "a", "response": "b", "number": 1}\n{"prompt": "c"}\n'
    assert list(documents_of("x.jsonl", lines)) == ["a\nb", "c"]
    assert list(documents_of("x.xhtml", "<html>\n  <p>a <i>b</i></p>\n  <p>c &amp; d</p>\n</html>")) == ["a b\nc & d"]
    assert list(documents_of("x.html", "<p>a</p>")) == ["<p>a</p>"]


def test_nothing_near_an_evaluation_prompt_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Name a colour."}, {"prompt": QUOTED}]
    files = {"near.md": QUOTED.encode(), "far.md": b"far", "rows.jsonl": "\n".join(map(json.dumps, rows)).encode()}
    repository = make_repository(tmp_path, files)
    write(tmp_path, repository, evaluation_shingles([]), tmp_path / "out.txt")
    assert sorted((tmp_path / "out.txt").read_text().split("\n\n")) == ["", "Name a colour.", "far"]
    assert "2 documents left out" in capsys.readouterr().out


def test_a_repository_has_a_most(tmp_path: Path) -> None:
    make_repository(tmp_path, {f"{number}.md": b"word " * 20 for number in range(10)})
    write(tmp_path, Repository("owner/name", "HEAD", "MIT", "", 250), set(), tmp_path / "out.txt")
    assert 250 <= len((tmp_path / "out.txt").read_text()) < 360


def test_all_turns_of_evaluation_files_count(tmp_path: Path) -> None:
    first, second = "one two three four five six seven eight nine", "ten eleven twelve"
    (tmp_path / "a-eval.jsonl").write_text(json.dumps({"turns": [first, second]}) + "\n")
    (tmp_path / "b-eval.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    known = evaluation_shingles([tmp_path / "a-eval.jsonl", tmp_path / "b-eval.jsonl"])
    assert known >= shingles(first) | shingles(second) | shingles(PROMPT)
