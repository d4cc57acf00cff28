"""The prior at work: a bonus on the candidates of a batch of draft steps, and what verification teaches of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.request import Request
from engine.vocab.bigram_graph import CONTINUATIONS, LOG_PROB_SCALE, BigramGraph
from engine.vocab.context_table import WAYS
from engine.vocab.continuations import Continuations
from engine.vocab.ngrams import PRESENCE_FLOOR, lookup, presence
from engine.vocab.prior import (
    LEARNING_RATE,
    LIGHT_DRAFT_WEIGHTS,
    MAX_WEIGHT,
    NUM_FEATURES,
    REPEAT_BONUS,
    Candidates,
    FloatArray,
    bonus_features,
)
from engine.vocab.prior_weights import learn
from engine.vocab.session_vocab import SessionVocab
from engine.vocab.text_matches import match_continuations
from kernels import native_prior


@dataclass(frozen=True, slots=True)
class Drafted:
    """One draft token's candidates: a row of a batch's, and where its token ids, logits and features are."""

    candidates: Candidates
    row: int
    addresses: tuple[int, int, int]


class DraftPrior:
    """Adds bonuses to draft logits by what followed before, and learns their weights session by session.

    Args:
        learned: weights that follow verification; False: ``LIGHT_DRAFT_WEIGHTS``.
        order: longest n-grams that count, 1 to 3.
        graph: what follows what in general text; None without.
        matches: whether repeats of any length in the sequence's own text count.
    """

    def __init__(self, learned: bool, order: int, graph: BigramGraph | None, matches: bool) -> None:
        self._learned, self._graph = learned, graph
        self.uses_matches = matches
        """Whether repeats of the sequence's own text count."""
        self._used = np.array([True, order >= 2, order >= 3, graph is not None, matches], np.float32)
        assert len(self._used) == NUM_FEATURES == native_prior.NUM_FEATURES
        self.kernel = make_kernel(self._used, graph) if native_prior.is_available() else None
        """The compiled prior; None: numpy."""
        self._fixed = np.array(LIGHT_DRAFT_WEIGHTS, np.float32)

    def score(
        self,
        sessions: Sequence[SessionVocab],
        contexts: Sequence[tuple[int, int]],
        drafts: Sequence[Sequence[int]],
        token_ids: NDArray[np.int32],
        logits: NDArray[np.float32],
        greedy: Sequence[bool],
    ) -> tuple[NDArray[np.float32], list[Drafted]]:
        """Logits with the prior.

        Args:
            sessions: one a row; the same one may come more than once.
            contexts: the last two tokens of each row, the older first; -1 for one that does not exist.
            drafts: those of the step before this one, of each row.
            token_ids: [B, C], -1 for none.
            logits: [B, C] the draft's own, -inf for none.
            greedy: whether each row takes its best candidate: only there a long repeat decides.

        Returns:
            [B, C] float32, and the candidates of each row as ``learn`` wants them.
        """
        matches = match_continuations([session.text for session in sessions], drafts) if self.uses_matches else None
        ngrams, weights = [session.ngrams for session in sessions], self._weights(sessions)
        if self.kernel is not None:
            units, views = [one.unit for one in ngrams], [one.view.address for one in ngrams]
            known = _no_matches(len(ngrams)) if matches is None else matches
            pair = known.token_ids, known.values
            features, scores = self.kernel.scores(views, units, contexts, weights, pair, token_ids, logits)
            return self._with_repeats(scores, Candidates(token_ids, logits, features), sessions, greedy)
        bigrams, trigrams = lookup(ngrams, contexts)
        last = np.array([context[1] for context in contexts], np.int32)
        graph = None if self._graph is None else self._graph.continuations(last)
        features = bonus_features(token_ids, presence(ngrams, token_ids), bigrams, trigrams, graph, matches)
        features *= self._used
        candidates = Candidates(token_ids, logits, features)
        return self._with_repeats(candidates.scores(weights), candidates, sessions, greedy)

    def _with_repeats(
        self, scores: FloatArray, candidates: Candidates, sessions: Sequence[SessionVocab], greedy: Sequence[bool]
    ) -> tuple[NDArray[np.float32], list[Drafted]]:
        candidates.add_repeat_bonus(scores, np.array(list(map(self._repeat_bonus, sessions, greedy)), np.float32))
        return scores.astype(np.float32, copy=False), drafted_rows(candidates)

    def _repeat_bonus(self, session: SessionVocab | None, greedy: bool) -> float:
        if session is None or not greedy:
            return 0.0
        return session.weights.repeat_bonus if self._learned else REPEAT_BONUS

    def of_chains(
        self,
        sessions: Sequence[SessionVocab | None],
        contexts: Sequence[tuple[int, int]],
        greedy: Sequence[bool],
    ) -> native_prior.ChainPrior:
        """What compiled chains of drafts need to add the prior themselves; None: a row without one."""
        views, units, weights, texts = zip(*map(self._addresses, sessions), strict=True)
        bonuses = list(map(self._repeat_bonus, sessions, greedy))
        return native_prior.ChainPrior(views, units, weights, bonuses, contexts, texts if self.uses_matches else None)

    def applied(self, session: SessionVocab) -> NDArray[np.float32]:
        """[NUM_FEATURES]: what each feature weighs in a session's next drafts; 0 for those that do not count."""
        applied: NDArray[np.float32] = self._weights([session])[0] * self._used
        return applied

    def learn(self, sessions: Sequence[SessionVocab], drafted: Sequence[Drafted], targets: Sequence[int]) -> None:
        """Learn from verified positions; nothing where the weights are fixed.

        Args:
            sessions: whose position each is.
            drafted: the candidates there.
            targets: the token that the target chose.
        """
        if not self._learned or not drafted:
            return
        if self.kernel is not None:
            owners = [session.weights for session in sessions]
            advantages, of_repeats = self.kernel.learn(
                [one.addresses for one in drafted],
                drafted[0].candidates.token_ids.shape[1],
                [owner.address for owner in owners],
                targets,
                LEARNING_RATE,
                MAX_WEIGHT,
                REPEAT_BONUS,
            )
            for owner, advantage, of_repeat in zip(owners, advantages, of_repeats, strict=True):
                owner.count(advantage, of_repeat)
            return
        parts = [(one.candidates, one.row) for one in drafted]
        candidates = Candidates(
            np.stack([part.token_ids[row] for part, row in parts]),
            np.stack([part.logits[row] for part, row in parts]),
            np.stack([part.features[row] for part, row in parts]),
        )
        learn([session.weights for session in sessions], candidates, np.array(targets, np.int32))

    def _addresses(self, session: SessionVocab | None) -> tuple[int, float, int, int]:
        """Of counts, what one occurrence is worth in them, of weights and text."""
        fixed = int(self._fixed.ctypes.data)
        if session is None:
            return 0, 1.0, fixed, 0
        weights = session.weights.bonus_address if self._learned else fixed
        return session.ngrams.view.address, session.ngrams.unit, weights, session.text.address

    def _weights(self, sessions: Sequence[SessionVocab]) -> NDArray[np.float32]:
        if not self._learned:
            return np.tile(self._fixed, (len(sessions), 1))
        return np.stack([session.weights.bonus for session in sessions])


def make_kernel(used: NDArray[np.float32], graph: BigramGraph | None) -> native_prior.PriorKernel:
    """The compiled prior, of the features that are ``used``."""
    arrays = None if graph is None else (graph.offsets, graph.token_ids, graph.log_probs)
    return native_prior.PriorKernel(arrays, CONTINUATIONS, LOG_PROB_SCALE, used, WAYS, PRESENCE_FLOOR)


def drafted_rows(candidates: Candidates) -> list[Drafted]:
    """The rows of a batch one by one, as ``DraftPrior.learn`` wants them."""
    arrays = candidates.token_ids, candidates.logits, candidates.features
    begins = [int(array.ctypes.data) for array in arrays]
    strides = [array.strides[0] for array in arrays]
    (ids, logits, features), (id_stride, logit_stride, feature_stride) = begins, strides
    return [
        Drafted(candidates, row, (ids + row * id_stride, logits + row * logit_stride, features + row * feature_stride))
        for row in range(len(candidates.token_ids))
    ]


def _no_matches(num_rows: int) -> Continuations:
    return Continuations(np.empty((num_rows, 0), np.int32), np.empty((num_rows, 0), np.float32))


def last_two(request: Request) -> tuple[int, int]:
    """The tokens before the next draft token, the older first; -1 for one that does not exist."""
    two_ago, one_ago = [-1, -1, *request.all_token_ids[-2:], *request.draft_token_ids[-2:]][-2:]
    return two_ago, one_ago
