"""The Triton kernels of the prior, in Triton's interpreter where there is no GPU, against the compiled CPU code."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
pytest.importorskip("triton")

from numpy.typing import NDArray

from evospec.engine.draft_vocab.bigram_graph import build_bigram_graph
from evospec.kernels.head_rows import HeadRows
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import DraftStep, TokenRows
from evospec.kernels.session_memory import DraftedRounds, SessionMemory, TextMemory
from evospec.kernels.session_options import NUM_FEATURES, SessionOptions, TableSizes, drafted_ints
from evospec.kernels.triton.session_prior import add_priors_triton
from evospec.kernels.triton.text_repeats import include_repeats_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, HIDDEN, COLUMNS, PLACES = 60, 20, 24, 4
SIZES = TableSizes(64, 4, 128, 2)
ROWS = [1, -1, 2, 0]
"""The session and text of each row; that of -1 has none, and that of 0 is empty."""


class Given:
    """Sessions with texts that repeat themselves, and a draft of random numbers."""

    def __init__(self, seed: int, order: int, *, with_graph: bool, own_head: bool) -> None:
        self.rng = rng = np.random.default_rng(seed)
        texts = [[], *(rng.integers(0, 9, size).tolist() for size in (150, 400))]
        graph = build_bigram_graph([np.array(texts[2], np.int32)], VOCAB) if with_graph else None
        uses = (True, order >= 2, order >= 3, True, True)
        options = SessionOptions(3, 0, uses=uses, half_life=30.0, sizes=SIZES)
        self.sessions, self.texts = Sessions(options, np.ones(VOCAB, np.bool_), graph), Texts(3, 256)
        for slot, text in enumerate(texts):
            self.sessions.clear(slot, (rng.random(NUM_FEATURES) * 3).tolist())
            self.sessions.begin(slot, text, [], [])
            self.texts.clear(slot)
            rows = TokenRows()
            rows.add(slot, text)
            self.texts.extend(rows)
        self.hidden, self.head = (rng.normal(size=(size, HIDDEN)).astype(np.float32) for size in (len(ROWS), VOCAB))
        self.row_of = np.arange(VOCAB, dtype=np.int32)
        if own_head:
            self.row_of = np.where(self.row_of % 3 == 0, -1, VOCAB - 1 - self.row_of).astype(np.int32)
        self.drafts = rng.integers(0, 9, (PLACES, len(ROWS))).astype(np.int32)

    def found(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Candidates in falling order; the last rows have fewer than there is room for."""
        logits = -np.sort(-self.rng.normal(size=(len(ROWS), COLUMNS)).astype(np.float32) * 3)
        tokens = np.stack([self.rng.permutation(VOCAB)[:COLUMNS] for _ in ROWS]).astype(np.int32)
        tokens[2:, -3:], logits[2:, -3:] = -1, -np.inf
        return logits, tokens

    def logits_of(self, rows: NDArray[np.int32], tokens: NDArray[np.int32]) -> torch.Tensor:
        places = self.row_of[tokens]
        logits = (self.head[places] * self.hidden[rows]).sum(axis=1)
        return torch.from_numpy(np.where(places < 0, np.float32("nan"), logits))

    def learn(self) -> None:
        """The drafts are right."""
        verified = TokenRows()
        for row, slot in enumerate(ROWS):
            if slot >= 0:
                verified.add(slot, self.drafts[:, row].tolist(), num_drafts=PLACES)
        self.sessions.missed(verified, self.texts)
        self.sessions.learn(verified)


@pytest.mark.parametrize(("order", "with_graph", "own_head"), [(3, True, False), (2, False, True), (1, True, True)])
def test_priors_are_the_cpus(order: int, with_graph: bool, own_head: bool) -> None:
    """Candidates, features, scores and first choices of a chain's rounds, and what is learned from them."""
    on_cpu, on_gpu = (Given(order, order, with_graph=with_graph, own_head=own_head) for _ in range(2))
    slots = torch.tensor(ROWS, dtype=torch.int32, device=DEVICE)
    sessions, texts = SessionMemory.of(on_gpu.sessions, DEVICE), TextMemory.of(on_gpu.texts, DEVICE)
    row_of = torch.from_numpy(on_gpu.row_of).to(DEVICE) if own_head else None
    head = HeadRows(torch.from_numpy(on_gpu.head).to(DEVICE), row_of)
    hidden = torch.from_numpy(on_gpu.hidden).to(DEVICE)
    block = torch.full((PLACES, len(ROWS) * drafted_ints(COLUMNS)), -7, dtype=torch.int32, device=DEVICE)
    drafted, step = DraftedRounds(block, len(ROWS), COLUMNS), DraftStep(ROWS, ROWS)
    num_new = 0
    for place in range(PLACES):
        logits, tokens = on_cpu.found()
        found = torch.from_numpy(logits.copy()).to(DEVICE), torch.from_numpy(tokens.copy()).to(DEVICE)
        include_repeats_triton(found, hidden, head, texts, slots, drafted, place)
        scores, best = add_priors_triton(sessions, slots, drafted, place)
        step.go_on(on_cpu.drafts[:place].T.tolist(), torch.from_numpy(tokens), torch.from_numpy(logits))
        on_cpu.sessions.score(on_cpu.texts, step, on_cpu.logits_of)
        num_new += (found[1].cpu().numpy() != tokens).sum()
        assert drafted.token_ids(place).tolist() == tokens.tolist()
        assert scores.cpu().numpy() == pytest.approx(logits, abs=1e-4)
        assert best.tolist() == step.best
        drafted.chosen(place).copy_(torch.from_numpy(on_gpu.drafts[place]))
    assert num_new > 0
    on_gpu.sessions.take_drafts(block.cpu(), COLUMNS, ROWS, [PLACES] * len(ROWS))
    on_cpu.learn()
    on_gpu.learn()
    for session in range(3):
        expected = on_cpu.sessions
        assert on_gpu.sessions.weights(session) == pytest.approx(expected.weights(session), abs=1e-4)
        assert on_gpu.sessions.counts(session).num_lessons == expected.counts(session).num_lessons
        assert on_gpu.sessions.state(session).gain == pytest.approx(expected.state(session).gain)
