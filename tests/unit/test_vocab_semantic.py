"""The approximate index against exact logits; its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.draft_vocab.semantic import SemanticIndex, open_semantic_index

NUM_ROWS, WIDTH = 3000, 48


class Head:
    """Rows near a plane of few dimensions, of norms that differ as those of real heads do."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        basis = rng.normal(size=(12, WIDTH))
        norms = rng.lognormal(0.0, 0.3, (NUM_ROWS, 1))
        self.rows = (
            (rng.normal(size=(NUM_ROWS, 12)) @ basis + rng.normal(size=(NUM_ROWS, WIDTH)) * 0.3) * norms
        ).astype(np.float32)
        self.token_ids = rng.permutation(10 * NUM_ROWS)[:NUM_ROWS]
        self.hidden = (rng.normal(size=(200, 12)) @ basis * 5).astype(np.float32)
        self.times_read = 0

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self.times_read += 1
        return self.token_ids, self.rows


@pytest.fixture(scope="module")
def head() -> Head:
    return Head()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "index"


@pytest.fixture(scope="module")
def index(head: Head, directory: Path) -> SemanticIndex:
    return open_semantic_index(directory, "abc", head.read, threads=1)


def test_finds_the_largest_logits(head: Head, index: SemanticIndex) -> None:
    found = index.neighbours(head.hidden, 10)
    best = head.token_ids[np.argsort(-(head.hidden @ head.rows.T), axis=1)[:, :10]]
    recall = np.mean(
        [len(set(row) & set(exact)) / 10 for row, exact in zip(found.tolist(), best.tolist(), strict=True)]
    )
    assert recall >= 0.9
    assert len(index) == NUM_ROWS


def test_nearest_come_first_whatever_the_batch(head: Head, index: SemanticIndex) -> None:
    found = index.neighbours(head.hidden[:3], 5)
    row_of = {token_id: row for row, token_id in enumerate(head.token_ids.tolist())}
    for hidden, tokens in zip(head.hidden, found.tolist(), strict=False):
        logits = [float(hidden @ head.rows[row_of[token_id]]) for token_id in tokens]
        assert logits == pytest.approx(sorted(logits, reverse=True), rel=1e-2)
    assert index.neighbours(head.hidden[:1], 5).tolist() == found[:1].tolist()
    assert index.neighbours(head.hidden[:1] * 1000, 5).tolist() == found[:1].tolist()
    assert index.neighbours(head.hidden[:0], 5).shape == (0, 5)


def test_built_once_and_again_when_damaged(head: Head, index: SemanticIndex, directory: Path) -> None:
    expected = index.neighbours(head.hidden[:4], 3).tolist()
    times_read = head.times_read
    again = open_semantic_index(directory, "abc", head.read, threads=1)
    assert head.times_read == times_read
    assert again.neighbours(head.hidden[:4], 3).tolist() == expected
    (path,) = directory.iterdir()
    damaged = directory / "semantic-def.usearch"
    for content in (b"", b"junk" * 100, path.read_bytes()[:10_000]):
        damaged.write_bytes(content)
        open_semantic_index(directory, "def", head.read, threads=1)
        assert damaged.stat().st_size == path.stat().st_size
    assert head.times_read == times_read + 3


def test_fewer_rows_than_wanted(tmp_path: Path) -> None:
    rows = np.eye(3, 8, dtype=np.float32)
    index = open_semantic_index(tmp_path, "tiny", lambda: (np.array([7, 8, 9]), rows), threads=1)
    found = index.neighbours(rows[:2] * 2 + rows[1], 5)
    assert found[:, 0].tolist() == [7, 8]
    assert (found[:, 3:] == -1).all()
