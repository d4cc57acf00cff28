"""The approximate index against exact logits; its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evospec.engine.draft_vocab.semantic import SemanticIndex, open_semantic_index

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


@pytest.fixture(scope="module")
def head() -> Head:
    return Head()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model") / "index"


@pytest.fixture(scope="module")
def index(head: Head, directory: Path) -> SemanticIndex:
    return open_semantic_index(directory, head.token_ids, head.rows, threads=1)


def test_finds_the_largest_logits(head: Head, index: SemanticIndex) -> None:
    found = [index.neighbours(hidden, 10) for hidden in head.hidden]
    best = head.token_ids[np.argsort(-(head.hidden @ head.rows.T), axis=1)[:, :10]]
    recall = np.mean([len(set(row) & set(exact)) / 10 for row, exact in zip(found, best.tolist(), strict=True)])
    assert recall >= 0.9


def test_nearest_come_first_whatever_the_size(head: Head, index: SemanticIndex) -> None:
    row_of = {token_id: row for row, token_id in enumerate(head.token_ids.tolist())}
    for hidden in head.hidden[:3]:
        found = index.neighbours(hidden, 5)
        logits = [float(hidden @ head.rows[row_of[token_id]]) for token_id in found]
        assert logits == pytest.approx(sorted(logits, reverse=True), rel=1e-2)
        assert index.neighbours(hidden * 1000, 5) == found


def test_built_once_and_again_when_damaged(head: Head, index: SemanticIndex, directory: Path) -> None:
    expected = [index.neighbours(hidden, 3) for hidden in head.hidden[:4]]
    (path,) = directory.iterdir()
    whole = path.stat()
    again = open_semantic_index(directory, head.token_ids, head.rows, threads=1)
    assert path.stat().st_mtime_ns == whole.st_mtime_ns
    assert [again.neighbours(hidden, 3) for hidden in head.hidden[:4]] == expected
    beginning = path.read_bytes()[:10_000]
    for content in (b"", b"junk" * 100, beginning):
        path.unlink()  # the file of the index above stays as it is
        path.write_bytes(content)
        open_semantic_index(directory, head.token_ids, head.rows, threads=1)
        assert path.stat().st_size == whole.st_size
    open_semantic_index(directory, head.token_ids, 2 * head.rows, threads=1)
    assert len(list(directory.iterdir())) == 2


def test_fewer_rows_than_wanted(tmp_path: Path) -> None:
    rows = np.eye(3, 8, dtype=np.float32)
    index = open_semantic_index(tmp_path, np.array([7, 8, 9]), rows, threads=1)
    for row, token_id in enumerate((7, 8)):
        found = index.neighbours(rows[row] * 2 + rows[1], 5)
        assert found[0] == token_id
        assert len(found) == 3
