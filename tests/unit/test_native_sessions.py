"""Sessions and texts, compiled, against the same in plain Python: counts, tails, priors, repeats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from evospec.engine.draft_vocab.bigram_graph import BigramGraph, build_bigram_graph
from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import DraftStep, TokenRows
from evospec.kernels.session_options import NUM_FEATURES, PRESENCE, SessionOptions, TableSizes
from tests.reference.bigram_graph import TenantBigrams, continuations
from tests.reference.continuations import Continuations
from tests.reference.ngrams import NgramSizes, SessionNgrams, lookup, presence
from tests.reference.prior import Candidates, bonus_features
from tests.reference.prior_weights import PriorWeights, learn
from tests.reference.replacement import FIXED_TARGET_EVENTS, MIN_RESIDENCY, ArcReplacement, LruReplacement
from tests.reference.text_matches import TextMatches, copied, match_continuations

VOCAB, CORE, NONE = 60, 10, [0.0] * NUM_FEATURES
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
LACKING = [0, 5, 10]
NO_TEXTS = Texts(0, 0)
SMALL = TableSizes(8, 3, 16, 2)


def sessions(**options: object) -> Sessions:
    """Two sessions; the first tokens are the core."""
    made = Sessions(SessionOptions(**({"num_sessions": 2, "num_places": 8} | options)), np.arange(VOCAB) < CORE)  # type: ignore[arg-type]
    for session in range(2):
        made.clear(session, NONE)
    return made


def rows_of(*rows: tuple[int, list[int]], tenant: int = -1, num_accepted: int = 0, num_drafts: int = 0) -> TokenRows:
    """Tokens of some slots."""
    made = TokenRows()
    for slot, tokens in rows:
        made.add(slot, tokens, tenant, -1, num_accepted, num_drafts)
    return made


def tail_of(policy: type[ArcReplacement | LruReplacement], capacity: int) -> Sessions:
    """Sessions whose tails keep to a policy."""
    return sessions(num_places=capacity, in_context=False, only_recency=policy is LruReplacement)


@settings(max_examples=100)
@given(runs=st.lists(TOKENS, max_size=8), sizes=st.sampled_from([SMALL, TableSizes()]))
def test_counts_are_those_of_the_reference(runs: list[list[int]], sizes: TableSizes) -> None:
    """In every row of the tables, whatever is overwritten; the other session knows nothing of it."""
    made = sessions(sizes=sizes, half_life=20.0)
    expected = SessionNgrams(VOCAB, NgramSizes(*vars(sizes).values()), half_life=20.0)
    text: list[int] = []
    for tokens in runs:
        made.catch_up(rows_of((1, tokens)))
        expected.observe(tokens, text)
        text += tokens
    assert made.state(1).unit == expected.unit
    assert np.array_equal(made.unigrams(1), expected.unigrams)
    for order, table in ((2, expected.bigrams), (3, expected.trigrams)):
        own = made.table(1, order)
        assert np.array_equal(own.keys, table.keys)
        assert np.array_equal(own.token_ids, table.token_ids)
        assert np.array_equal(own.counts, table.counts)
    assert made.counts(1).num_read == made.counts(1).num_counted == len(text)
    assert made.counts(0).num_read == 0
    assert not made.unigrams(0).any()


def test_what_a_past_knows_of_a_prompt_is_not_counted_again() -> None:
    made = sessions()
    made.begin(0, [1, 2, 3, 4], [], [])
    assert made.counts(0).num_counted == 4
    made.counts(0).num_counted = 4
    made.begin(0, [1, 2, 3, 4, 5, 5, 5, 5], [], [])
    assert made.counts(0).num_counted == 4 + 3  # 345, 455, 555, and 555 again


class TailMachine(RuleBasedStateMachine):
    """A session's tail against a policy in Python, and against what every policy owes: a token stays in its slot, one
    that is named or new is not evicted, and what can be written is."""

    policy: type[ArcReplacement | LruReplacement]
    TOKENS = st.lists(st.integers(CORE, CORE + 14), max_size=8)

    @initialize(capacity=st.integers(1, 6))
    def create(self, capacity: int) -> None:
        self.sessions = tail_of(self.policy, capacity)
        self.tail, self.capacity = self.policy(capacity), capacity
        self.slots: dict[int, int] = {}
        self.placed_at: dict[int, int] = {}
        self.step = 0

    @rule(token_ids=TOKENS)
    def insert(self, token_ids: list[int]) -> None:
        writes = [(slot, token_id) for _, slot, token_id in self.sessions.insert(1, token_ids, "context", 100).tolist()]
        assert writes == self.tail.insert(list(dict.fromkeys(token_ids)))
        resident = self.slots.items()
        movable = {s for s, t in resident if self.step - self.placed_at[s] >= MIN_RESIDENCY and t not in token_ids}
        fresh = [token_id for token_id in dict.fromkeys(token_ids) if token_id not in self.slots.values()]
        room = self.capacity - len(self.slots) + len(movable)
        assert [token_id for _, token_id in writes] == fresh[:room]
        assert all(slot in movable or slot not in self.slots for slot, _ in writes)
        assert len(dict(writes)) == len(writes)
        self.slots |= dict(writes)
        self.placed_at |= {slot: self.step for slot, _ in writes}

    @rule(token_ids=TOKENS)
    def touch(self, token_ids: list[int]) -> None:
        self.sessions.catch_up(rows_of((1, token_ids)))
        self.tail.touch(token_ids)
        self.step += 1

    @rule()
    def many_events(self) -> None:
        """So that the target starts to move, and ghosts are forgotten."""
        for event in range(FIXED_TARGET_EVENTS):
            self.insert([CORE + event % 15, CORE + (event * 7) % 15])
            self.touch([CORE + event % 4])

    @invariant()
    def agrees(self) -> None:
        contents = self.sessions.tail(1)
        assert contents == self.tail.contents()
        assert sorted(contents) == sorted(self.slots.values())
        assert self.sessions.tail(0) == []

    @invariant()
    def contents_can_be_restored(self) -> None:
        self.sessions.insert(0, self.sessions.tail(1), "context", 100)
        assert self.sessions.tail(0) == self.sessions.tail(1)
        self.sessions.clear(0, NONE)


class ArcMachine(TailMachine):
    policy = ArcReplacement


class LruMachine(TailMachine):
    policy = LruReplacement


TestArc, TestLru = ArcMachine.TestCase, LruMachine.TestCase
TestArc.settings = TestLru.settings = settings(max_examples=30)


def test_arc_keeps_used_tokens_through_a_scan() -> None:
    """Four tokens that were used, in a tail of eight, and 36 others that are not."""
    kept = {}
    for policy in (ArcReplacement, LruReplacement):
        made = tail_of(policy, 8)
        made.insert(1, [20, 21, 22, 23], "context", 100)
        made.catch_up(rows_of((1, [20, 21, 22, 23])))
        for token_id in range(24, VOCAB):
            for _ in range(MIN_RESIDENCY):
                made.catch_up(rows_of((1, [])))
            made.insert(1, [token_id], "context", 100)
        kept[policy] = {20, 21, 22, 23} & set(made.tail(1))
    assert kept == {ArcReplacement: {21, 22, 23}, LruReplacement: set()}, "one goes while T1 is below its target"


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_tokens_of_other_vocabularies_are_refused(token_id: int) -> None:
    made = sessions()
    for call in (
        lambda: made.begin(0, [1, token_id], [], []),
        lambda: made.insert(0, [token_id], "context"),
        lambda: made.catch_up(rows_of((0, [1]), (1, [token_id]))),
        lambda: made.missed(rows_of((0, [1]), (1, [token_id])), NO_TEXTS),
    ):
        with pytest.raises(IndexError):
            call()


def test_limits_count_what_is_new_and_the_core_never_enters() -> None:
    made = sessions()
    made.insert(0, [20, 21], "context", 100)
    writes = made.insert(0, [3, 21, 22, 22, 23, 24], "target", 2)
    assert writes[:, 2].tolist() == [22, 23]
    assert made.counts(0).by_source("insertions") == {"context": 2, "target": 2}


def test_a_tail_starts_with_the_prompt_then_the_past_then_the_tenant() -> None:
    made = sessions(num_places=4)
    writes = made.begin(0, [1, 30, 31], [31, 40], [50, 51])
    assert set(writes[:, 2].tolist()) == {30, 31, 40, 50}
    assert made.tail(0) == [31, 30, 40, 50]


@given(text=TOKENS, after=st.lists(st.integers(0, 3), max_size=20), few=st.booleans())
def test_repeats_are_those_of_the_reference(text: list[int], after: list[int], few: bool) -> None:
    text = [token_id % 4 for token_id in text] if few else text
    texts, expected = Texts(2, 64), TextMatches()
    for slot in range(2):
        texts.clear(slot)
    texts.extend(rows_of((1, text[:7])))
    texts.extend(rows_of((1, text[7:])))
    expected.extend(text)
    assert texts.find(1, after) == expected.find(after)
    place, length = expected.longest()
    [copy], [agreed] = texts.copy([1], 5)
    assert agreed == length
    assert not length or copy == copied(text, place, 5)
    assert texts.find(0, after) == TextMatches().find(after)


@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=200))
def test_a_full_text_forgets_its_older_half(tokens: list[int]) -> None:
    texts, kept = Texts(1, 16), list[int]()
    texts.clear(0)
    for token_id in tokens:
        texts.extend(rows_of((0, [token_id])))
        kept = [*(kept[8:] if len(kept) == 16 else kept), token_id]
        expected = TextMatches()
        expected.extend(kept)
        assert texts.find(0) == expected.find()


def graph_of(rng: np.random.Generator) -> BigramGraph:
    return build_bigram_graph([rng.integers(0, 12, 400).astype(np.int32)], VOCAB)


def logits_of(_: NDArray[np.int32], token_ids: NDArray[np.int32]) -> torch.Tensor:
    """Of what repeats; the head lacks some of it."""
    return torch.from_numpy(np.where(np.isin(token_ids, LACKING), np.nan, 0.25).astype(np.float32))


def candidates_of(rng: np.random.Generator, rows: int, columns: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    token_ids = np.stack([rng.permutation(VOCAB)[:columns] for _ in range(rows)]).astype(np.int32)
    logits = -np.sort(-rng.normal(size=(rows, columns)).astype(np.float32) * 2, axis=1)
    for row, missing in enumerate(rng.integers(0, columns, rows)):
        token_ids[row, columns - missing :], logits[row, columns - missing :] = -1, -np.inf
    return token_ids, logits


class Reference:
    """One session with its prior, in Python."""

    def __init__(self, text: Sequence[int], weights: Sequence[float], uses: Sequence[bool], graph: BigramGraph | None):
        self.ngrams, self.text = SessionNgrams(VOCAB, NgramSizes(*vars(SMALL).values()), half_life=20.0), TextMatches()
        self.ngrams.observe(text)
        self.text.extend(text)
        self.weights, self.last = PriorWeights(weights), [-1, -1, *text][-2:]
        self.uses, self.graph = np.array(uses, np.float32), graph

    def candidates(self, drafts: list[int], token_ids: NDArray[np.int32], logits: NDArray[np.float32]) -> Candidates:
        two_ago, one_ago = [*self.last, *drafts][-2:]
        bigrams, trigrams = lookup([self.ngrams], [(two_ago, one_ago)])
        of_graph: Continuations | None = None if self.graph is None else continuations(self.graph, np.array([one_ago]))
        matches = match_continuations([self.text], [drafts])
        present = presence([self.ngrams], token_ids)
        features = bonus_features(token_ids, present, bigrams, trigrams, of_graph, matches) * self.uses
        return Candidates(token_ids, logits, features)


@example(
    seed=381, columns=3, num_drafts=2, order=1, with_graph=False, matches=True, in_background=True
)  # a repeat in the weakest place
@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    columns=st.integers(1, 40),
    num_drafts=st.integers(0, 3),
    order=st.integers(1, 3),
    with_graph=st.booleans(),
    matches=st.booleans(),
    in_background=st.booleans(),
)
def test_priors_are_those_of_the_reference(
    seed: int, columns: int, num_drafts: int, order: int, with_graph: bool, matches: bool, in_background: bool
) -> None:
    """Scores of candidates, and what verification teaches; a row without a session stays as it is."""
    rng = np.random.default_rng(seed)
    graph, uses = graph_of(rng) if with_graph else None, (True, order >= 2, order >= 3, with_graph, matches)
    options = SessionOptions(2, 0, uses=uses, half_life=20.0, presence=PRESENCE, sizes=SMALL)
    made = Sessions(options, np.arange(VOCAB) < CORE, graph)
    texts, references = Texts(2, 512), []
    for session in range(2):
        text = rng.integers(0, 12, rng.integers(0, 200)).tolist()
        references.append(Reference(text, weights := (rng.random(NUM_FEATURES) * 3).tolist(), uses, graph))
        made.clear(session, weights)
        made.begin(session, text, [], [])
        texts.clear(session)
        texts.extend(rows_of((session, text)))
    drafts, rows = rng.integers(0, 12, (3, num_drafts)).tolist(), [1, -1, 0]
    targets = rng.integers(0, 12, (3, num_drafts + 1)).astype(np.int32)
    step, lessons = DraftStep(rows, rows), []
    for number in range(num_drafts + 1):
        before = [of_row[:number] for of_row in drafts]
        token_ids, logits = candidates_of(rng, 3, columns)
        known = [dict(zip(*row, strict=True)) for row in zip(token_ids.tolist(), logits.tolist(), strict=True)]
        scores = logits.copy()
        step.go_on(before, torch.from_numpy(token_ids), torch.from_numpy(scores))
        made.score(texts, step, logits_of)
        for row, column in np.ndindex(logits.shape):
            if (token_id := token_ids[row, column]) not in known[row]:
                logits[row, column] = logits[row, column] if token_id in LACKING else 0.25
        assert np.array_equal(scores[1], logits[1])
        assert step.best == np.maximum(token_ids[range(3), scores.argmax(axis=1)], 0).tolist()
        for row, session in ((0, 1), (2, 0)):
            reference = references[session]
            if matches:
                repeats = reference.text.find(before[row])
                assert set(list(repeats)[:columns]) <= set(token_ids[row].tolist()) or len(repeats) > columns
            expected = reference.candidates(before[row], token_ids[row : row + 1], logits[row : row + 1])
            assert scores[row] == pytest.approx(expected.scores(reference.weights.bonus[None])[0], abs=1e-4)
            lessons.append((reference.weights, expected, targets[row, number]))
    verified = rows_of((1, targets[0].tolist()), (0, targets[2].tolist()), num_drafts=num_drafts + 1)
    made.missed(verified, NO_TEXTS)
    made.learn(verified, in_background=in_background)
    for session, reference in enumerate(references):
        own = [one for one in lessons if one[0] is reference.weights]
        parts = ([getattr(one, name) for _, one, _ in own] for name in ("token_ids", "logits", "features"))
        learn([reference.weights] * len(own), Candidates(*map(np.concatenate, parts)), np.array([t for *_, t in own]))
        assert made.weights(session) == pytest.approx(reference.weights.learned, abs=1e-5)
        shown = reference.weights.bonus * np.array(uses)
        assert made.applied_weights([session])[0] == pytest.approx(shown, abs=1e-5)
        assert made.counts(session).num_lessons == num_drafts + 1


def test_what_a_restored_session_had_counts_in_its_prior() -> None:
    made = sessions(num_places=0)
    made.clear(0, [1.0, *NONE[1:]])
    made.unigrams(0)[21], made.counts(0).num_counted = 1.0, 1
    made.begin(0, [22], [], [])
    step, logits = DraftStep([0], [-1]), torch.zeros(1, 3)
    step.go_on([[]], torch.tensor([[20, 21, 22]], dtype=torch.int32), logits)
    made.score(NO_TEXTS, step, logits_of)
    assert logits.tolist() == [[0.0, 1.0, 0.0]]


def test_a_text_goes_on_with_what_was_verified() -> None:
    made, texts, verified = sessions(), Texts(1, 64), TokenRows()
    texts.clear(0)
    texts.extend(rows_of((0, [1, 2, 3])))
    verified.add(0, [1, 2], text=0)
    made.missed(verified, texts)
    assert texts.find(0) == {3: 2}


def test_the_target_and_what_follows_by_the_graph_enter_where_a_token_could_not_be_drafted() -> None:
    graph = build_bigram_graph([np.tile(np.arange(20, 40, dtype=np.int32), 9)], VOCAB)
    options = SessionOptions(2, 16, num_tenants=1)
    made = Sessions(options, np.arange(VOCAB) < CORE, graph)
    made.clear(0, NONE)
    made.clear_tenant(0)
    tenant = TenantBigrams(graph)
    verified = rows_of((0, [3, 25]), tenant=0, num_accepted=1, num_drafts=1)
    assert made.missed(verified, NO_TEXTS) == [1]
    made.learn(verified, [0], np.array([[5, 50], [25, 51]], np.int32), in_background=True)
    tenant.observe([3, 25])
    near = [token_id for seed in (25, 51) for token_id in tenant.neighbours(seed)]
    assert made.take_writes()[:, 2].tolist() == [25, 50, 51, *near]
    assert near == [26]
    counts = made.counts(0)
    assert (counts.verified, counts.covered, counts.events) == (2, 1, 1)
    assert counts.by_source("insertions") == {"context": 1, "target": 2, "graph": 1}
    verified = rows_of((0, [51, 26]), tenant=0, num_accepted=1, num_drafts=1)
    assert made.missed(verified, NO_TEXTS) == [-1]
    made.learn(verified)
    assert made.counts(0).by_source("hits") == {"target": 1}


@given(seed=st.integers(0, 2**32 - 1))
def test_neighbours_are_those_of_the_reference(seed: int) -> None:
    """A tenant's own pairs over the general graph."""
    rng = np.random.default_rng(seed)
    graph = graph_of(rng)
    made = Sessions(SessionOptions(1, 40, num_tenants=1, in_context=False), np.arange(VOCAB) < 0, graph)
    made.clear(0, NONE)
    made.clear_tenant(0)
    tenant, text = TenantBigrams(graph), list[int]()
    for _ in range(5):
        tokens = rng.integers(0, 12, 6).tolist()
        made.catch_up(rows_of((0, tokens), tenant=0))
        tenant.observe(tokens, text)
        text += tokens
    seed_token = int(rng.integers(0, 12))
    verified = rows_of((0, [seed_token]), tenant=0)
    made.missed(verified, NO_TEXTS)
    made.learn(verified, [0])
    tenant.observe([seed_token], text)
    assert made.take_writes()[:, 2].tolist() == tenant.neighbours(seed_token)
