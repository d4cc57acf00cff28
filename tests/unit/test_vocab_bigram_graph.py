"""The statistical index against counting by hand; files that are damaged or for another model."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from evospec.engine.draft_vocab.bigram_graph import BigramGraph, build_bigram_graph
from evospec.engine.models.config import ModelError
from tests.reference.bigram_graph import TenantBigrams, neighbours

VOCAB = 12


def graph_of(*texts: list[int], vocab_size: int = VOCAB) -> BigramGraph:
    return build_bigram_graph((np.array(text, np.int32) for text in texts), vocab_size)


def edges_of(graph: BigramGraph) -> dict[tuple[int, int], float]:
    sources = np.repeat(np.arange(graph.vocab_size), np.diff(graph.offsets)).tolist()
    return dict(zip(zip(sources, graph.token_ids.tolist(), strict=True), graph.log_probs.tolist(), strict=True))


@given(texts=st.lists(st.lists(st.integers(0, 3), max_size=80), max_size=4))
def test_edges_are_the_pairs_seen_often_enough(texts: list[list[int]]) -> None:
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    followed = Counter(source for text in texts for source in text[:-1])
    expected = {pair: np.log(count / followed[pair[0]]) for pair, count in pairs.items() if count >= 5}
    assert edges_of(graph_of(*texts)) == pytest.approx(expected, rel=1e-5)


def test_neighbours_come_most_likely_first() -> None:
    text = [1, 2] * 30 + [1, 3] * 20 + [1, 4] * 40
    graph = graph_of(text)
    assert neighbours(graph, 1).tolist() == [4, 2, 3]
    assert neighbours(graph, 1, 2).tolist() == [4, 2]
    assert neighbours(graph, 9).tolist() == []


def test_out_degree_and_probability_are_bounded() -> None:
    often = [[0, token_id] for token_id in range(1, 101) for _ in range(5 + token_id)]
    graph = graph_of(*often, vocab_size=101)
    assert neighbours(graph, 0, 1000).tolist() == list(range(100, 36, -1))
    rare = graph_of([0, 1] * 60_000 + [0, 2] * 6)  # p(2 | 0) = 1e-4 · 0.9999
    assert neighbours(rare, 0).tolist() == [1]


def test_a_file_gives_the_graph_back(tmp_path: Path) -> None:
    graph = graph_of([1, 2] * 30 + [3, 2] * 30)
    path = tmp_path / "bigrams.safetensors"
    graph.save(path)
    assert edges_of(BigramGraph.load(path, VOCAB)) == edges_of(graph)
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_no_use_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bigrams.safetensors"
    with pytest.raises(ModelError, match="no bigram graph"):
        BigramGraph.load(path, VOCAB)
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="no bigram graph"):
        BigramGraph.load(path, VOCAB)
    graph_of([1, 2] * 30).save(path)
    with pytest.raises(ModelError, match="over 12 tokens, but the model has 13"):
        BigramGraph.load(path, VOCAB + 1)
    sound = load_file(path)
    damages = {
        "offsets": sound["offsets"][::-1].copy(),
        "token_ids": sound["token_ids"] + VOCAB,
        "log_probs": sound["log_probs"][:-1],
    }
    for name, array in damages.items():
        save_file({**sound, name: array}, path)
        with pytest.raises(ModelError, match="damaged"):
            BigramGraph.load(path, VOCAB)


def test_a_tenants_own_text_moves_the_general_graph() -> None:
    general = graph_of([1, 2] * 60 + [1, 3] * 40)
    tenant = TenantBigrams(general)
    assert tenant.neighbours(1) == [2, 3]
    tenant.observe([7], before=[5, 1])
    assert tenant.neighbours(1) == [2, 3, 7], "one pair weighs less than general text does"
    tenant.observe([1, 7] * 10)
    assert tenant.neighbours(1, 2) == [7, 2]
    assert tenant.neighbours(7) == [1]
    assert tenant.neighbours(11) == []
    alone = TenantBigrams(None)
    alone.observe([1, 7, 1, 8, 1, 7])
    assert alone.neighbours(1) == [7, 8]
