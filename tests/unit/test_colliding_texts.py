"""Texts that are made so that hashes with a factor known to all would collide: they cost no more than others."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from evospec.kernels.native_sessions import Sessions
from evospec.kernels.native_texts import Texts
from evospec.kernels.session_library import TokenRows, view_of
from evospec.kernels.session_options import NUM_FEATURES, SessionOptions

VOCAB, CORE = 1 << 16, 512
GOLDEN, GOLDEN_32 = 0x9E3779B97F4A7C15, 0x9E3779B1
"""What such factors usually are: 2^64 by the golden ratio, and the prime nearest to 2^32 by it."""
MASK = (1 << 64) - 1


def rows_of(tokens: list[int]) -> TokenRows:
    """Tokens of slot 0."""
    rows = TokenRows()
    rows.add(0, tokens)
    return rows


def longest_run(is_taken: NDArray[np.bool_]) -> int:
    """Of taken places in a row, the last and the first included: nobody who looks for a place passes more."""
    free = np.flatnonzero(~is_taken)
    return int(np.diff(free, append=free[0] + len(is_taken)).max()) - 1


def pairs_of_few_places(size: int, places: int) -> list[int]:
    """Tokens whose pairs have four of so many places, by the middle bits of a product."""
    rng, text = np.random.default_rng(0), [1]
    seconds = np.arange(VOCAB, dtype=np.uint64)
    while len(text) < size:
        hashes = (np.uint64(text[-1] << 32) + seconds) * np.uint64(GOLDEN) >> np.uint64(32)
        text.append(int(rng.choice(np.flatnonzero((hashes & np.uint64(places - 1)) < 4))))
    return text


def test_pairs_of_a_text_are_spread_over_its_table() -> None:
    texts = Texts(1, 8192)
    arrays = texts.arrays()
    text = pairs_of_few_places(4096, arrays.buckets)
    texts.clear(0)
    texts.extend(rows_of(text))
    latest = view_of(arrays.latest, np.int32, arrays.buckets)
    assert (latest >= 0).sum() > 3000
    assert longest_run(latest >= 0) < 200
    assert arrays.factor != Texts(1, 8192).arrays().factor


def triples_of_one_remainder(size: int, number: int) -> list[int]:
    """Tokens whose triples have hashes that a number divides: buckets of a standard library's are remainders."""
    rng, text = np.random.default_rng(0), [7, 11]
    while len(text) < size:
        hashed = (text[-2] << 31 | text[-1]) * GOLDEN & MASK
        lowest = -(hashed & ~(VOCAB - 1)) % number
        ending = int(rng.choice(np.arange(lowest, VOCAB, number)))
        text.append(ending ^ hashed & VOCAB - 1)
    return text


def test_triples_of_a_prompt_are_told_apart_without_a_search() -> None:
    """300 such prompts took 8 s of a processor, others 0.3 s; 5,087 is how many buckets a set of so many has."""
    sessions = Sessions(SessionOptions(num_sessions=1, num_places=0), np.ones(VOCAB, np.bool_))
    prompt = triples_of_one_remainder(4096, 5087)

    def begin() -> None:
        sessions.clear(0, [0.0] * NUM_FEATURES)
        sessions.counts(0).num_counted = 1  # a session with a past
        sessions.begin(0, prompt, [], [])

    assert processor_seconds(begin, 300) < 2.5
    assert sessions.counts(0).num_counted == 1 + len(set(zip(prompt, prompt[1:], prompt[2:], strict=False)))


def test_a_tail_finds_its_tokens_without_a_search() -> None:
    """For such tokens the steps took 3 s of a processor, for others 0.01 s."""
    places, buckets = 512, 4096
    sessions = Sessions(SessionOptions(num_sessions=1, num_places=places), np.arange(VOCAB) < CORE)
    sessions.clear(0, [0.0] * NUM_FEATURES)
    outside = np.arange(CORE, VOCAB, dtype=np.uint32)
    homes = (outside * np.uint32(GOLDEN_32) >> np.uint32(8)) & np.uint32(buckets - 1)
    tokens = np.random.default_rng(0).permutation(outside[np.argsort(homes, kind="stable")][:1900])
    steps = iter(np.resize(tokens, (600, 8)).tolist())
    assert processor_seconds(lambda: sessions.learn(rows_of(next(steps))), 600) < 1.0


def processor_seconds(call: Callable[[], None], times: int) -> float:
    """That this thread takes to call something so often."""
    started = time.thread_time()
    for _ in range(times):
        call()
    return time.thread_time() - started
