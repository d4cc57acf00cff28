"""``evospec vocab build``: what the target has generated becomes what a draft can propose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evospec.adapters.training import count
from evospec.adapters.training.conversations import Conversation, data_directory, write_shard
from evospec.engine.draft_vocab.bigram_graph import BigramGraph
from evospec.engine.models.config import ModelError
from evospec.engine.speculation.drafters.head import read_token_counts, static_vocabulary
from evospec.engine.speculation.drafters.session_head import GRAPH_FILE
from tests.reference.bigram_graph import neighbours
from tests.running_command import run_evospec
from tests.tiny_models import VOCAB_SIZE, make_directory


def write_conversations(directory: Path, *conversations: tuple[list[int], list[int]]) -> None:
    made = [
        Conversation(key, len(prompt), np.array(prompt + answer, dtype=np.int32))
        for key, (prompt, answer) in enumerate(conversations)
    ]
    write_shard(directory, made, [torch.zeros(len(c.token_ids), 4, dtype=torch.bfloat16) for c in made])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a tiny model whose training data would lie in ``tmp_path``."""
    monkeypatch.setattr("evospec.adapters.training.conversations.CACHE", tmp_path)
    return str(make_directory(tmp_path / "tiny").path)


def test_only_answers_are_counted_over_all_shards(model: str, tmp_path: Path) -> None:
    write_conversations(data_directory("tiny"), ([7, 7, 7], [5, 9, 5]), ([8], [9]))
    write_conversations(data_directory("tiny"), ([7, 8], [511, 5]))
    count.main(model, tmp_path / "drafts")
    counts = read_token_counts(tmp_path / "drafts", VOCAB_SIZE)
    assert {token: int(counts[token]) for token in counts.nonzero().flatten().tolist()} == {5: 3, 9: 2, 511: 1}
    assert static_vocabulary(counts, 3, always={0}).tolist() == [0, 5, 9]
    assert count.coverage(counts, [1, 2, 4]) == pytest.approx([3 / 6, 5 / 6, 1.0])


def test_bigrams_of_answers_become_a_graph(model: str, tmp_path: Path) -> None:
    """From the prompt's last token on, and none across two conversations."""
    write_conversations(data_directory("tiny"), *[([7, 8], [5, 9])] * 5, *[([3], [4])] * 4)
    count.main(model, tmp_path / "drafts")
    graph = BigramGraph.load(tmp_path / "drafts" / GRAPH_FILE, VOCAB_SIZE)
    followers = {token: neighbours(graph, token).tolist() for token in range(VOCAB_SIZE)}
    assert {token: following for token, following in followers.items() if following} == {8: [5], 5: [9]}


def test_without_conversations(model: str) -> None:
    with pytest.raises(ModelError, match="no conversations"):
        count.main(model)


def test_command_says_what_is_wrong_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evospec(monkeypatch, "vocab", "build", "no-such-model") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "'no-such-model' is neither" in printed.err
