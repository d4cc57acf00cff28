"""What the engine's step pays for a grammar that it enforces itself: random ordinary schemas, and texts through them.

Each is at the bounds of what ``is_ordinary`` admits. Texts prefer long tokens, short ones, or those that open
something. Needs no server. Times are of the thread's own computing, the shortest of three tries.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.attack.bars import at_most
from evospec.engine.config import ModelConfig
from evospec.engine.messages import Grammar
from evospec.engine.models.registry import resolve_model
from evospec.engine.sampling.grammar import GrammarCompiler, GrammarMatcher
from evospec.engine.sampling.json_schema import GrammarError
from evospec.engine.sampling.ordinary_schema import is_ordinary
from evospec.engine.text.tokenizer import Tokenizer

BARS = {"longest_mask_us": at_most(1000), "longest_token_us": at_most(1000)}
_TRIES = 3
_TOKENS_OF_A_TEXT = 120
_TEXTS_OF_A_SCHEMA = 4
_CHOICES = 40
_VALUES = ("a", "ab", "aa", 1, 11, 1.5, None, True, "a b", "é", "")


class OrdinarySchemas:
    """Makes one schema after another; the same ``chance`` makes the same ones."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def next(self) -> Grammar:
        while True:
            grammar = Grammar("json_schema", json.dumps(self._schema(0)))
            if is_ordinary(grammar):
                return grammar

    def _schema(self, depth: int) -> Any:
        kinds: list[Callable[[int], Any]] = [self._string, self._number, self._values, lambda _: True]
        if depth < 4:
            kinds += [self._union, self._array, self._object, self._map] * 2
        return self._chance.choice(kinds)(depth)

    def _string(self, depth: int) -> Any:
        least, most = sorted(self._chance.choices((0, 1, 2, 30, 300, 4096), k=2))
        return {"type": "string", "minLength": least, "maxLength": most}

    def _number(self, depth: int) -> Any:
        least, most = sorted(self._chance.sample((-(10**9), -54321, -1, 0, 1, 7, 99, 12345, 10**9), k=2))
        return {"type": self._chance.choice(("integer", "number")), "minimum": least, "maximum": most}

    def _values(self, depth: int) -> Any:
        if self._chance.random() < 0.5:
            return {"enum": self._chance.choices(_VALUES, k=self._chance.randint(1, 4))}
        return {"enum": ["a" * self._chance.randint(0, 30) + str(i) for i in range(256)]}

    def _union(self, depth: int) -> Any:
        branches = [self._schema(depth + 1)] * self._chance.randint(1, 2)
        return {"anyOf": [*branches, *(self._schema(depth + 1) for _ in range(self._chance.randint(0, 2)))]}

    def _array(self, depth: int) -> Any:
        least, most = sorted(self._chance.choices((0, 1, 3, 64, 128), k=2))
        return {"type": "array", "items": self._schema(depth + 1), "minItems": least, "maxItems": most}

    def _object(self, depth: int) -> Any:
        names = [self._chance.choice(("a", "aaa", "é", "a b")) + str(i) for i in range(self._chance.randint(0, 15))]
        properties = {name: self._schema(depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names[: self._chance.randint(0, 3)]}

    def _map(self, depth: int) -> Any:
        return {"type": "object", "additionalProperties": self._schema(depth + 1)}


def run(seconds: float, seed: int) -> dict[str, float]:
    """Walk through one schema after another for some seconds; the longest times, in microseconds."""
    chance = random.Random(seed)
    tokenizer = Tokenizer.from_files(resolve_model(ModelConfig()))
    token_bytes = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    compiler, schemas = GrammarCompiler(token_bytes, tokenizer.eos_token_ids), OrdinarySchemas(chance)
    longest = np.zeros(2)
    num_schemas, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        grammar = schemas.next()
        try:
            compiled = compiler.compile(grammar)
        except GrammarError:  # some bounds exclude each other
            continue
        num_schemas += 1
        times = [_walk(GrammarMatcher(compiled), token_bytes, chance) for _ in range(_TEXTS_OF_A_SCHEMA)]
        if (np.max(times, axis=0) > np.maximum(longest, 200e-6)).any():
            print(np.round(1e6 * np.max(times, axis=0)), grammar.schema, flush=True)
        longest = np.max([longest, *times], axis=0)
    mask, token = 1e6 * longest
    return {"schemas": num_schemas, "longest_mask_us": round(mask), "longest_token_us": round(token)}


def _walk(matcher: GrammarMatcher, token_bytes: list[bytes], chance: random.Random) -> NDArray[np.float64]:
    """The longest times of a mask and of a token of one text, in seconds."""
    mask = np.zeros((1, -(-len(token_bytes) // 32)), dtype=np.int32)
    preference = chance.choice((_any, _longest, _shortest, _opening))
    longest = np.zeros(2)
    for _ in range(_TOKENS_OF_A_TEXT):
        mask_seconds = min(_seconds(partial(matcher.fill_bitmask, mask, 0)) for _ in range(_TRIES))
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[: len(token_bytes)])
        if not len(allowed):
            break
        token_id = int(chance.choice(preference(allowed.tolist(), token_bytes)))
        tries = []
        for _ in range(_TRIES):
            tries.append(_seconds(partial(matcher.accept, token_id)))
            matcher.rollback(1)
        matcher.accept(token_id)
        longest = np.maximum(longest, [mask_seconds, min(tries)])
    return longest


def _seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def _any(allowed: list[int], token_bytes: list[bytes]) -> list[int]:
    return allowed


def _longest(allowed: list[int], token_bytes: list[bytes]) -> list[int]:
    return sorted(allowed, key=lambda token_id: -len(token_bytes[token_id]))[:_CHOICES]


def _shortest(allowed: list[int], token_bytes: list[bytes]) -> list[int]:
    return sorted(allowed, key=lambda token_id: len(token_bytes[token_id]))[:_CHOICES]


def _opening(allowed: list[int], token_bytes: list[bytes]) -> list[int]:
    return [token_id for token_id in allowed if token_bytes[token_id][:1] in (b"{", b"[", b'"', b",")] or allowed
