"""Grammars with real parts: tokenizer, xgrammar, sampler, and logits that would love to break them."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import psutil
import pydantic
import pytest
import tokenizers
import torch

from benchmarks.attack.compiling import SLOW
from evospec.engine.config import ModelConfig, SpeculationConfig
from evospec.engine.core import EngineCore
from evospec.engine.draft_vocab.vocab import DraftVocab
from evospec.engine.messages import EngineOutput, EngineRequest, Grammar, SamplingParams
from evospec.engine.models.registry import resolve_model
from evospec.engine.request import Request
from evospec.engine.sampling import constrained, grammar_client, grammar_pool
from evospec.engine.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarMatcher
from evospec.engine.sampling.grammar_client import GrammarProcess, ProcessCursor
from evospec.engine.sampling.grammar_cursor import GRAMMAR_CONTRADICTS, GrammarCursor
from evospec.engine.sampling.grammar_in_place import InPlaceCursor
from evospec.engine.sampling.grammar_pool import GrammarPool
from evospec.engine.sampling.json_schema import GrammarError, check_json_schema
from evospec.engine.sampling.sampler import Sampler, SamplingRows
from evospec.engine.speculation.drafters.base import DraftCosts, Proposer
from evospec.engine.speculation.length.policy import EarlyStop
from evospec.engine.step import DraftSlot, Proposal, Proposals
from evospec.engine.text.tokenizer import Tokenizer
from evospec.engine.truncation import StopChecker
from tests.grammars import begin, compiled, schema, settle, with_grammar
from tests.tiny_drafts import Engine, Setting
from tests.tiny_models import make_directory


class Person(pydantic.BaseModel):
    """A schema with references, bounds, lists and choices."""

    class Pet(pydantic.BaseModel):
        kind: Literal["cat", "dog"]
        legs: int = pydantic.Field(ge=0, le=8)

    name: str = pydantic.Field(min_length=1, max_length=6)
    age: int = pydantic.Field(ge=0, le=150)
    pets: list[Pet] = pydantic.Field(max_length=2)
    nickname: str | None


class Owner(pydantic.BaseModel):
    """A discriminated union, with an extension of somebody's own."""

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"]
        lives: int = pydantic.Field(ge=0, le=9)

    class Dog(pydantic.BaseModel):
        kind: Literal["dog"]
        legs: int = pydantic.Field(ge=0, le=8)

    pet: Cat | Dog = pydantic.Field(discriminator="kind", json_schema_extra={"x-order": 1})


PERSON = Grammar(kind="json_schema", schema=json.dumps(Person.model_json_schema()))
JSON_OBJECT = Grammar(kind="json_object")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE that knows JSON's idioms, with special tokens and a padded vocabulary."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(
        ['{"name": "Ann", "age": 3, "pets": [{"kind": "cat", "legs": 4}], "nickname": null}'], trainer
    )
    end = backend.token_to_id("<|end|>")
    assert end is not None
    return Tokenizer(backend, backend.get_vocab_size() + 5, None, (end,), None)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    token_bytes = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    return GrammarCompiler(token_bytes, tokenizer.eos_token_ids)


@pytest.fixture(scope="module")
def pool(tokenizer: Tokenizer) -> GrammarPool:
    return GrammarPool(tokenizer, num_slots=64)


def strings(count: int, **keywords: object) -> dict[str, Any]:
    """Schema of an object with strings of any length or, with ``keywords``, of some."""
    return {"type": "object", "properties": {f"{i}": {"type": "string", **keywords} for i in range(count)}}


def make_request(sampling: SamplingParams, request_id: str = "r", tenant: str = "tenant") -> Request:
    return Request(request_id=request_id, client_id=b"client", tenant=tenant, sampling=sampling, prompt_token_ids=[1])


def generate(tokenizer: Tokenizer, pool: GrammarPool, seed: int, drafts: bool, **changes: Any) -> tuple[str, str]:
    """Text and finish reason of random logits under a grammar; quotes and end are likely, so that it ends."""
    sampler = Sampler(tokenizer.eos_token_ids)
    sampling = SamplingParams(max_tokens=400, seed=seed, **changes)
    request = make_request(sampling)
    cursor = begin(pool, request)
    checker = StopChecker(sampling, 1, 1000, tokenizer.eos_token_ids, tokenizer.token_bytes)
    generator = torch.Generator().manual_seed(seed)
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"}", b"]")]
    while True:
        draft_token_ids = (
            tuple(torch.randint(tokenizer.vocab_size, (3,), generator=generator).tolist()) if drafts else ()
        )
        settle(pool, cursor, list(draft_token_ids))
        logits = torch.randn(1 + len(draft_token_ids), tokenizer.vocab_size, generator=generator)
        logits[:, closing] += 3
        logits[:, -5:] += 20  # padding
        logits[:, list(tokenizer.special_token_ids)] += 20
        draft_token_ids = draft_token_ids[: cursor.num_masks - 1]
        [sampled] = sampler.sample(logits[: cursor.num_masks], [SamplingRows(request, draft_token_ids)])
        truncation = checker.push(sampled.token_ids)
        request.output_token_ids += sampled.token_ids[: truncation.num_kept]
        if truncation.finish_reason is not None:
            cursor.end()
            return tokenizer.decode(request.output_token_ids), truncation.finish_reason
        cursor.commit(sampled.token_ids)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 0.6, "presence_penalty": 1.0}])
def test_output_satisfies_the_schema(
    tokenizer: Tokenizer, pool: GrammarPool, drafts: bool, changes: dict[str, Any]
) -> None:
    for seed in range(8):
        text, finish_reason = generate(tokenizer, pool, seed, drafts, grammar=PERSON, **changes)
        if finish_reason == "stop":
            Person.model_validate_json(text)
        else:
            assert finish_reason == "length"
            assert text.lstrip()[:1] in ("", "{")
    assert generate(tokenizer, pool, 1, drafts, grammar=PERSON)[1] == "stop"


def test_output_satisfies_a_discriminated_union(tokenizer: Tokenizer, pool: GrammarPool) -> None:
    grammar = schema(Owner.model_json_schema())
    texts = [generate(tokenizer, pool, seed, False, grammar=grammar) for seed in range(8)]
    pets = [Owner.model_validate_json(text).pet for text, finish_reason in texts if finish_reason == "stop"]
    assert {pet.kind for pet in pets} == {"cat", "dog"}


def test_json_object_is_an_object_with_anything_in_it(tokenizer: Tokenizer, pool: GrammarPool) -> None:
    finished = [generate(tokenizer, pool, seed, False, grammar=JSON_OBJECT) for seed in range(12)]
    objects = [json.loads(text) for text, finish_reason in finished if finish_reason == "stop"]
    assert len(objects) >= 6
    assert all(isinstance(value, dict) for value in objects)
    assert any(objects)


@pytest.mark.parametrize("grammar", [PERSON, JSON_OBJECT])
def test_json_has_one_space_in_a_row(tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: Grammar) -> None:
    matcher = GrammarMatcher(compiler.compile(grammar))
    [brace], [space] = (tokenizer.encode(text, add_special_tokens=False) for text in "{ ")
    assert all(matcher.accept(token_id) for token_id in (brace, space))
    assert not matcher.accept(space)


PHONE = Grammar("regex", r"(\d{3}\n)?\d{3}-\d{4}")
TABLE = Grammar("ebnf", 'root ::= (row "\\n"){2,3}\nrow ::= [a-c]+ ("\\t" [0-9])*')


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(
    ("grammar", "matches"),
    [
        (PHONE, PHONE.schema),
        (TABLE, r"([a-c]+(\t[0-9])*\n){2,3}"),
        (Grammar("ebnf", 'root ::= root "a" | "b"'), "ba*"),
    ],
)
def test_output_is_what_an_expression_or_a_grammar_describes(
    tokenizer: Tokenizer, pool: GrammarPool, grammar: Grammar, matches: str, drafts: bool
) -> None:
    for seed in range(5):
        text, finish_reason = generate(tokenizer, pool, seed, drafts, grammar=grammar)
        assert re.fullmatch(matches, text) or finish_reason == "length", text


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(a", "regular expression cannot be used: .*parenthesis is not closed"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("ebnf", "root ::= a", 'grammar cannot be used: .*"a" is not defined'),
        ("ebnf", "", "root rule"),
    ],
)
def test_expressions_and_grammars_that_cannot_be_used_are_refused(
    compiler: GrammarCompiler, kind: Any, text: str, message: str
) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler.compile(Grammar(kind, text))


def test_after_the_grammar_only_end_tokens_remain(tokenizer: Tokenizer, pool: GrammarPool) -> None:
    """Also with ``ignore_eos`` and ``min_tokens``, and with drafts past the end."""
    [end] = tokenizer.eos_token_ids
    grammar = schema({"const": 1})
    request = make_request(SamplingParams(max_tokens=9, seed=0, temperature=0.0, min_tokens=9, grammar=grammar))
    sampler = Sampler(tokenizer.eos_token_ids)
    cursor = begin(pool, request)
    [one] = tokenizer.encode("1")
    logits = torch.randn(4, tokenizer.vocab_size)
    settle(pool, cursor, [one, end, end, one])
    assert cursor.num_masks == 4, "after the end, another 1 is not allowed"
    [sampled] = sampler.sample(logits, [SamplingRows(request, (one, end, end))])
    assert sampled.token_ids == [one, end, end, end]
    request.output_token_ids += sampled.token_ids
    cursor.commit(sampled.token_ids)
    settle(pool, cursor, [end])
    [sampled] = sampler.sample(logits[:2], [SamplingRows(request, (end,))])
    assert sampled.token_ids == [end, end]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": "objec"}', "objec"),
        ('{"type": "object"', "valid JSON"),
        ("5", "object or a boolean"),
        ('{"type": "string", "pattern": "("}', "parenthesis"),
        ('{"$ref": "#/$defs/missing"}', "missing"),
        ('{"$ref": "https://example.com/schema.json"}', "another document"),
        ('{"properties": {"a": {"not": {}}}}', "#/properties/a is not supported: not"),
        ('{"anyOf": [{"if": {}}]}', "#/anyOf/0 is not supported: if"),
        ('{"allOf": [{}, {}]}', "allOf"),
        ('{"type": "object", "required": ["a"], "oneOf": [{}]}', "oneOf beside required"),
        ('{"anyOf": [{"type": "string"}], "nullable": true, "x-a": 1}', "anyOf beside nullable"),
        ('{"pattern": "a", "maxLength": 3}', "pattern beside"),
        ('{"type": "string", "format": "date", "minLength": 3}', "format beside"),
        ('{"enum": ["abc"], "maxLength": 2}', "enum beside maxLength"),
        ('{"const": 1, "minimum": 5}', "const beside minimum"),
        ('{"maxLength": 3}', "maxLength without type"),
        ('{"minimum": 3}', "minimum without type"),
        ('{"maxItems": 3}', "maxItems without type"),
        ('{"minProperties": 1, "additionalProperties": {}}', "minProperties without type"),
        ('{"type": "object", "additionalProperties": true, "required": ["a", "b"]}', "required of a, b"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"type": "array", "contains": {"const": 2}}', "contains"),
        ('{"type": "object", "dependentSchemas": {"a": {}}}', "dependentSchemas"),
        ('{"type": "number", "multipleOf": 0.1}', "multipleOf"),
        ('{"type": "object", "properties": {"a": {}}, "propertyNames": {"pattern": "b"}}', "propertyNames beside"),
        ('{"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}', "patternProperties beside"),
        (json.dumps({"type": "string", "pattern": 'a"'}), "quotation mark"),
        (json.dumps({"type": "object", "patternProperties": {r"\\\\": {}}}), "a backslash"),
        (json.dumps({"enum": ["x" * 70_000]}), "longer than"),
        ('{"items":' * 51 + "{}" + "}" * 51, "50 levels"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "valid JSON"),
        ('{"const": ' + "9" * 400 + "}", "cannot be used"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(compiler: GrammarCompiler, schema: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message.replace("$", r"\$")):
        compiler.compile(Grammar(kind="json_schema", schema=schema))


def test_property_names_are_not_keywords() -> None:
    check_json_schema('{"type": "object", "properties": {"not": {"type": "string"}, "if": true}, "description": "x"}')


def test_a_grammar_is_compiled_once_for_a_tenant(pool: GrammarPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew for another, so that none can tell what another uses. What was used longest ago makes room."""
    monkeypatch.setattr(grammar_pool, "_MAX_PROCESSES", 4)
    began: list[Grammar] = []

    def observed(control: Any, grammar: Grammar, *shape: int) -> Any:
        began.append(grammar)
        return GrammarProcess(control, grammar, *shape)

    monkeypatch.setattr(grammar_pool, "GrammarProcess", observed)
    grammars = [schema({"const": [i]}) for i in range(5)]
    for tenant in ("a", "a", "b"):
        cursor = compiled(pool, with_grammar(grammars[0], tenant=tenant))["r"]
        assert isinstance(cursor, GrammarCursor)
        cursor.end()
    assert began == [grammars[0]] * 2
    for grammar in [*grammars[1:], grammars[0]]:
        cursor = compiled(pool, with_grammar(grammar, tenant="a"))["r"]
        assert isinstance(cursor, GrammarCursor)
        cursor.end()
    assert began == [grammars[0], *grammars, grammars[0]]


def test_more_grammars_than_processes_are_compiled_in_turn(pool: GrammarPool) -> None:
    """A sequence keeps its process: with more of them at once than there are places, the others wait for an end."""
    requests = {str(i): with_grammar(schema({"const": {"i": i}}), str(i)) for i in range(40)}
    for request in requests.values():
        pool.add(request)
    done: set[str] = set()
    while pool.waiting:
        for request, cursor in pool.take_ready():
            assert isinstance(cursor, GrammarCursor)
            cursor.end()
            done.add(request.request_id)
        time.sleep(0.001)
    assert done == set(requests)


def test_tenants_need_not_wait_for_what_another_compiles(pool: GrammarPool) -> None:
    """Nor for all that one has asked for before; and what nobody waits for any more is given up."""
    for i in range(3):
        pool.add(with_grammar(schema({"type": "string", "pattern": "^" + ".?" * (200 + i) + "$"}), f"slow {i}", "many"))
    pool.add(with_grammar(schema({"const": "quick"}), "quick", "few"))
    ready: list[str] = []
    while "quick" not in ready:
        ready += [request.request_id for request, _ in pool.take_ready()]
        time.sleep(0.001)
    assert ready == ["quick"]
    for i in range(3):
        pool.forget(f"slow {i}")
    assert not pool.waiting
    assert isinstance(compiled(pool, with_grammar(schema({"const": "next"}), tenant="many"))["r"], GrammarCursor)


def test_a_process_that_nobody_waits_for_any_more_is_ended(pool: GrammarPool) -> None:
    """Whatever it is doing; also before anybody has heard of it."""
    others = grammar_processes()
    pool.add(with_grammar(schema({"const": "unwanted"}), tenant="unwanted"))
    pool.take_ready()
    [unheard] = [process for (tenant, _), process in pool._processes() if tenant == "unwanted"]
    select.select([unheard], [], [])
    [process] = set(grammar_processes()) - set(others)
    process.suspend()
    try:
        pool.forget("r")
        process.wait(60)  # as it is suspended, it would not end by itself
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


QUICKLY_OUT_OF_PATIENCE = """
from evospec.engine.sampling import grammar_process
grammar_process.COMPILE_SECONDS = 1.0
grammar_process.main()
"""


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Grammars may compile for one second, where ten are allowed."""

    def start(command: list[str], **options: Any) -> Any:
        return subprocess.Popen([command[0], "-c", QUICKLY_OUT_OF_PATIENCE, *command[3:]], **options)

    monkeypatch.setattr(grammar_pool, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    grammar_pool._start_forking.cache_clear()
    yield
    grammar_pool._start_forking.cache_clear()


@pytest.mark.usefixtures("little_patience")
def test_grammars_are_refused_for_what_they_cost(smollm2_path: Path) -> None:
    """With a vocabulary of real size. The process of each is gone, and others are compiled afterwards."""
    pool = GrammarPool(Tokenizer.from_files(resolve_model(ModelConfig())), num_slots=4)
    ambiguous = schema({"type": "string", "pattern": "^(.?){500}$"})
    costly = [*((schema(each), "more than 10 s") for each in SLOW), (ambiguous, "too ambiguous")]
    for number, (grammar, message) in enumerate(costly, 1):
        good = schema({"const": number})
        ready = compiled(pool, with_grammar(grammar, "bad", "acme"), with_grammar(good, "good", "bravo"))
        assert message in str(ready["bad"])
        assert isinstance(ready["good"], GrammarCursor)
        assert isinstance(compiled(pool, with_grammar(schema({"const": -number}), tenant="acme"))["r"], GrammarCursor)


LOWER_CASE, UPPER_CASE = (
    schema({"type": "array", "items": {"type": "string", "pattern": pattern}}) for pattern in ("^[a-z]*$", "^[A-Z]*$")
)
"""Not ordinary, so that processes enforce them."""


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
        Grammar("regex", "a{1000000}"),
        Grammar("regex", "(.?){500}"),
        Grammar("ebnf", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000),
        Grammar("ebnf", "root ::= root"),
        Grammar("ebnf", 'root ::= (root | "")*'),
        Grammar("ebnf", 'root ::= "a" root root | root root "b" | ""'),
    ],
)
def test_whatever_becomes_of_a_strange_grammar_the_next_is_served(pool: GrammarPool, grammar: Grammar) -> None:
    result = compiled(pool, with_grammar(grammar, tenant="strange"))["r"]
    if isinstance(result, GrammarCursor):
        settle(pool, result)
        result.end()
    assert isinstance(compiled(pool, with_grammar(schema({"const": "strange"}), tenant="strange"))["r"], GrammarCursor)


def test_a_process_that_dies_takes_its_own_sequences_along(pool: GrammarPool) -> None:
    lost, kept = (begin(pool, with_grammar(grammar, "r")) for grammar in (LOWER_CASE, UPPER_CASE))
    assert isinstance(lost, ProcessCursor)
    assert lost._process._pid is not None
    os.kill(lost._process._pid, signal.SIGKILL)
    [digit] = [1]
    lost.commit([digit])
    settle(pool, lost)
    assert lost.failure
    settle(pool, kept, [])
    assert kept.failure is None
    for cursor in (lost, kept):
        cursor.end()
    assert isinstance(compiled(pool, with_grammar(schema({"type": "number"})))["r"], GrammarCursor)


LINE_FEED = schema({"type": "string", "pattern": "^\\n$"})
"""JSON has no token for it."""


@pytest.mark.parametrize(("grammar", "text"), [(schema({"type": "integer"}), "x"), (LINE_FEED, '"')])
def test_an_output_that_cannot_go_on_ends(tokenizer: Tokenizer, pool: GrammarPool, grammar: Grammar, text: str) -> None:
    """Because of a token that no mask has allowed, or because nothing is allowed any more."""
    cursor = begin(pool, with_grammar(grammar))
    assert cursor.failure is None
    cursor.commit(tokenizer.encode(text))
    settle(pool, cursor)
    assert cursor.failure == GRAMMAR_CONTRADICTS
    cursor.end()


def test_no_draft_is_looked_at_where_a_grammar_allows_nothing(tokenizer: Tokenizer, pool: GrammarPool) -> None:
    cursor = begin(pool, with_grammar(LINE_FEED))
    [quote] = tokenizer.encode('"')
    for draft in range(tokenizer.vocab_size):
        settle(pool, cursor, [quote, draft])
        assert (cursor.num_masks, cursor.failure) == (1, None)
    cursor.end()


def judge(monkeypatch: pytest.MonkeyPatch, is_cheap: bool) -> None:
    """Say of every grammar whether it is cheap, which is a matter of measured time otherwise."""

    def finding(process: GrammarProcess) -> bool:
        return is_cheap and process.is_compiled

    def ignore(process: GrammarProcess, measured: bool) -> None:
        del process, measured

    monkeypatch.setattr(GrammarProcess, "is_cheap", property(finding, ignore), raising=False)


def test_a_cheap_grammar_is_enforced_without_a_process(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says at once which drafts are allowed, and its masks are those that a process computes."""
    pool = GrammarPool(tokenizer, num_slots=2)
    grammar = schema({"type": "array", "items": {"enum": ["aa", "ab"]}})
    judge(monkeypatch, is_cheap=True)
    here = begin(pool, with_grammar(grammar, tenant="here"))
    judge(monkeypatch, is_cheap=False)
    there = begin(pool, with_grammar(grammar, tenant="there"))
    assert isinstance(here, InPlaceCursor)
    assert isinstance(there, ProcessCursor)
    for text, drafts in (("[", '"ax"'), ('"a', 'b"]'), ('a",', '"ba"')):
        token_ids, draft_ids = tokenizer.encode(text), tokenizer.encode(drafts)
        for cursor in (here, there):
            cursor.commit(token_ids)
        allowed = here.allowed(draft_ids)
        for cursor in (here, there):
            settle(pool, cursor, draft_ids)
            assert cursor.num_masks == 1 + len(allowed)
        assert np.array_equal(here.masks[: here.num_masks], there.masks[: there.num_masks])
    assert allowed == draft_ids[:1]


def test_a_matcher_that_fails_reads_its_output_anew(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have stopped within a token: its state is of no use. The masks are those without the fault."""
    pool = GrammarPool(tokenizer, num_slots=2)
    judge(monkeypatch, is_cheap=True)
    grammar = schema({"type": "array", "items": {"enum": ["aa", "ab"]}})
    sound, failing = (begin(pool, with_grammar(grammar, tenant=tenant)) for tenant in "ab")
    accept = GrammarMatcher.accept
    for text in ("[", '"a', 'b",'):
        for cursor in (sound, failing):
            cursor.commit(tokenizer.encode(text))
        settle(pool, sound)
        calls = count()

        def fail_once(matcher: GrammarMatcher, token_id: int, calls: count[int] = calls) -> bool:
            if next(calls) == 0:
                raise RuntimeError("injected")
            return accept(matcher, token_id)

        with monkeypatch.context() as patch:
            patch.setattr(GrammarMatcher, "accept", fail_once)
            settle(pool, failing)
        assert next(calls) > 1
        assert (failing.num_masks, failing.failure) == (1, None)
        assert np.array_equal(failing.masks[0], sound.masks[0])


def test_a_grammar_that_the_engine_cannot_enforce_goes_to_a_process(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> CompiledGrammar:
        raise MemoryError

    pool = GrammarPool(tokenizer, num_slots=2)
    judge(monkeypatch, is_cheap=True)
    monkeypatch.setattr(GrammarCompiler, "compile", cannot)  # here; processes have a compiler of their own
    assert isinstance(begin(pool, with_grammar(schema({"type": "integer"}))), ProcessCursor)


def test_a_process_is_killed_and_no_other_that_has_got_its_id(
    pool: GrammarPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, is_cheap=False)
    cursor = begin(pool, with_grammar(schema({"type": "integer"}), tenant="killed"))
    assert isinstance(cursor, ProcessCursor)
    assert cursor._process._pid is not None
    process = psutil.Process(cursor._process._pid)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        cursor._process._pid = stranger.pid
        cursor._process.kill()
        process.wait(20)
        assert stranger.poll() is None
        stranger.kill()


def test_a_process_that_cannot_be_understood_ends_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = GrammarPool(tokenizer, num_slots=2)
    judge(monkeypatch, is_cheap=False)
    one, other = (begin(pool, with_grammar(schema({"type": "integer"}), tenant=tenant)) for tenant in "ab")
    assert isinstance(one, ProcessCursor)
    receive, broken = GrammarProcess.receive, one._process

    def receive_nonsense(process: GrammarProcess) -> None:
        if process is broken:
            raise msgspec.DecodeError("injected")
        receive(process)

    monkeypatch.setattr(GrammarProcess, "receive", receive_nonsense)
    pool.poll()
    settle(pool, other)
    assert one.failure is not None
    assert (other.num_masks, other.failure) == (1, None)


def test_one_request_that_cannot_go_on_ends_alone(tmp_path: Path) -> None:
    """A dead end, a schema that xgrammar chokes on, and penalties that overflow, beside a request like any other."""
    engine = Engine(make_directory(tmp_path / "model"), Setting())
    prompt = list(range(100))

    requests = {
        "dead end": SamplingParams(
            max_tokens=20, seed=0, min_tokens=5, grammar=schema({"type": "string", "pattern": "^\\n$"})
        ),
        "choked": SamplingParams(max_tokens=20, seed=0, grammar=Grammar("json_schema", '{"const": ' + "9" * 400 + "}")),
        "overflow": SamplingParams(max_tokens=20, seed=0, top_k=40, repetition_penalty=1e-39),
        "plain": SamplingParams(max_tokens=20, seed=0, temperature=0.0),
    }
    ends: dict[str, EngineOutput] = {}
    for name, sampling in requests.items():
        message = EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, tenant="tests")
        engine.core.add(b"client", message)
    while len(ends) < len(requests):
        outputs, _ = engine.core.step()
        ends |= {output.request_id: output for output in outputs[b"client"] if output.finish_reason is not None}
    reasons = {name: (output.finish_reason, output.error_kind) for name, output in ends.items() if output.error}
    invalid, internal = ("error", "invalid"), ("error", "internal")
    assert reasons == {"dead end": invalid, "choked": invalid, "overflow": internal}
    assert ends["plain"].finish_reason == "length"


def grammar_processes() -> list[psutil.Process]:
    """Those of this process that enforce a grammar, without those that fork them."""
    ours = [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    return [
        each
        for each in ours
        if "evospec.engine.sampling.grammar_process" in each.cmdline() and each.ppid() != os.getpid()
    ]


@pytest.mark.parametrize("setting", [Setting(), Setting(num_blocks=16, max_batched_tokens=20)])
def test_a_late_mask_keeps_only_its_own_sequence_waiting(tmp_path: Path, setting: Setting) -> None:
    """Its output is the same as ever, with drafts, and also where others take its blocks meanwhile."""
    files = make_directory(tmp_path / "model")
    engine = Engine(files, setting, SpeculationConfig(method="ngram"))
    constrained = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, grammar=LOWER_CASE)
    plain = SamplingParams(max_tokens=80, seed=5)
    prompts = [[7, 8, 9] * 8, list(range(40))]
    expected = engine.generate_alone(prompts, [constrained, plain])
    late, other = engine.add(prompts[0], constrained), engine.add(prompts[1], plain)
    while len(engine.output(late)) < 5:
        engine.step()
    stopped = grammar_processes()
    try:
        for process in stopped:
            process.suspend()
        while len(engine.output(other)) < len(expected[1]):
            engine.step()
        assert len(engine.output(late)) < len(expected[0])
    finally:
        for process in stopped:
            process.resume()
    while engine.is_busy:
        engine.step()
    assert [engine.output(late), engine.output(other)] == expected
    assert engine.core.stats().blocks_used == 0


class TwoTries(Proposer):
    """Drafts after the first token only: at first ``wrong`` ones, in each later try the ``right`` ones."""

    description, costs = "two tries", DraftCosts(0, 0)
    vocab: DraftVocab | None = None

    def __init__(self, wrong: list[int], right: list[int]) -> None:
        self._next, self._right = wrong, right
        self.num_tries = 0

    def make_proposer(self, num_blocks: int) -> Proposer:
        return self

    def propose(self, slots: Sequence[DraftSlot], stop: EarlyStop | None = None) -> Proposals:
        proposals = {}
        for slot in slots:
            if len(slot.request.output_token_ids) == 1:
                proposals[slot.request] = Proposal(self._next[: slot.num_tokens])
                self._next = self._right
                self.num_tries += 1
        return proposals


def test_masks_of_drafts_that_were_dropped_are_not_used_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come late, so their step was in vain, and the next one has other drafts, whose masks come late, too."""
    files = make_directory(tmp_path / "model")
    sampling = SamplingParams(max_tokens=30, seed=3, grammar=Grammar("regex", "x(a[0-9]{20}|b[A-Z]{20})"))
    plain, prompt, wait = Engine(files, Setting()), [5, 6, 7, 8], GrammarPool.wait
    [expected] = plain.generate([prompt], [sampling])
    tokenizer = Tokenizer.from_files(files)
    wrong = tokenizer.encode("bZ" if tokenizer.token_bytes(expected[1]) == b"a" else "a5")
    draft = TwoTries(wrong, expected[1:3])
    monkeypatch.setattr(grammar_client, "_SLOW_SECONDS", math.inf)

    def wait_or_not(pool: GrammarPool, cursors: Iterable[GrammarCursor], seconds: float) -> None:
        if not draft.num_tries:
            wait(pool, cursors, seconds)

    monkeypatch.setattr(GrammarPool, "wait", wait_or_not)
    engine = Engine(files, Setting(), SpeculationConfig(method="none", adaptive=False), draft)
    assert engine.generate([prompt], [sampling]) == [expected]
    assert draft.num_tries == 2


def test_a_sequence_whose_masks_come_late_is_not_drafted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No draft token could be accepted: only the mask of the next token is asked for."""
    monkeypatch.setattr(constrained, "_PATIENCE", 60.0)  # masks that are not slow come, however busy the machine
    files, prompt = make_directory(tmp_path / "model"), [5, 6, 7, 8]
    sampling = SamplingParams(max_tokens=30, seed=3, grammar=Grammar("regex", "x(a[0-9]{20}|b[A-Z]{20})"))
    [expected] = Engine(files, Setting()).generate([prompt], [sampling])
    for slow_seconds, num_tries in ((math.inf, 1), (-1.0, 0)):
        monkeypatch.setattr(grammar_client, "_SLOW_SECONDS", slow_seconds)
        draft = TwoTries(expected[1:3], expected[1:3])
        engine = Engine(files, Setting(), SpeculationConfig(method="none", adaptive=False), draft)
        assert engine.generate([prompt], [sampling]) == [expected]
        assert draft.num_tries == num_tries


def test_masks_of_drafts_that_were_asked_about_before_do_not_count(tokenizer: Tokenizer, pool: GrammarPool) -> None:
    cursor = begin(pool, with_grammar(LOWER_CASE))
    assert isinstance(cursor, ProcessCursor)
    before, now = tokenizer.encode('["ab'), tokenizer.encode("[]")
    cursor.ask(before)
    pool.flush()
    select.select([cursor._process], [], [])
    cursor.ask(now)
    cursor._process.receive()
    assert (cursor.num_masks, cursor.is_answered) == (1, False)
    settle(pool, cursor, now)
    assert cursor.num_masks == 3
    cursor.end()


def test_a_request_whose_grammars_process_dies_ends_alone(tmp_path: Path) -> None:
    engine = Engine(make_directory(tmp_path / "model"), Setting())
    plain = SamplingParams(max_tokens=80, seed=5)
    [expected] = engine.generate([list(range(40))], [plain])
    sampling = SamplingParams(max_tokens=60, seed=3, ignore_eos=True, grammar=LOWER_CASE)
    message = EngineRequest(request_id="lost", prompt_token_ids=[7, 8, 9], sampling=sampling, tenant="tests")
    engine.core.add(b"client", message)
    while not engine.core.step()[0][b"client"]:
        time.sleep(0.001)
    other = engine.add(list(range(40)), plain)
    for process in grammar_processes():
        process.kill()
    errors: list[EngineOutput] = []
    while engine.is_busy or not errors:
        outputs, _ = engine.core.step()
        errors += [output for output in outputs[b"client"] if output.finish_reason is not None]
        engine.take(outputs)
    assert [(error.finish_reason, error.error_kind) for error in errors] == [("error", "invalid")]
    assert engine.output(other) == expected


def _refuse(core: EngineCore, sampling: SamplingParams) -> EngineOutput:
    core.add(b"client", EngineRequest(request_id="refused", prompt_token_ids=[1], sampling=sampling, tenant="tests"))
    while True:
        outputs, _ = core.step()
        for output in outputs[b"client"]:
            return output
        time.sleep(0.001)


def test_refused_requests_are_forgotten(tmp_path: Path) -> None:
    """What is remembered of a grammar that cannot be used does not keep those who asked."""
    core = Engine(make_directory(tmp_path / "model"), Setting()).core
    sampling = SamplingParams(max_tokens=1, seed=0, grammar=schema({"not": {}}))
    assert [_refuse(core, sampling).error_kind for _ in range(3)] == ["invalid"] * 3
    gc.collect()
    # Not isinstance, which asks each object's properties.
    assert not [each for each in gc.get_objects() if type(each) is Request and each.request_id.endswith("/refused")]
