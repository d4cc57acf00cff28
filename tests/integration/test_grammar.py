"""Grammars with real parts: tokenizer, xgrammar, sampler, and logits that would love to break them."""

from __future__ import annotations

import gc
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import tokenizers
import torch

from engine.core import EngineCore
from engine.messages import EngineOutput, EngineRequest, Grammar, SamplingParams
from engine.request import Request
from engine.sampling import grammar as grammar_module
from engine.sampling.compiling import CompilingRequests
from engine.sampling.grammar import CompiledGrammar, GrammarCompiler
from engine.sampling.json_schema import GrammarError, check_json_schema
from engine.sampling.patterns import pattern_size
from engine.sampling.sampler import Sampler, SamplingRows
from engine.text.tokenizer import Tokenizer
from engine.truncation import StopChecker
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
    return Tokenizer(backend, backend.get_vocab_size() + 5, None, (backend.token_to_id("<|end|>"),), None)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def strings(count: int, **keywords: object) -> dict[str, Any]:
    """Schema of an object with strings of any length or, with ``keywords``, of some."""
    return {"type": "object", "properties": {f"{i}": {"type": "string", **keywords} for i in range(count)}}


def make_request(sampling: SamplingParams, request_id: str = "r", tenant: str = "tenant") -> Request:
    return Request(request_id=request_id, client_id=b"client", tenant=tenant, sampling=sampling, prompt_token_ids=[1])


def generate(
    tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int, drafts: bool, **changes: Any
) -> tuple[str, str]:
    """Text and finish reason of random logits under a grammar; quotes and end are likely, so that it ends."""
    sampler = Sampler(tokenizer.eos_token_ids)
    sampling = SamplingParams(max_tokens=400, seed=seed, **changes)
    request = make_request(sampling)
    sampler.add(request, compiler.compile(changes["grammar"]).result())
    checker = StopChecker(sampling, 1, 1000, tokenizer.eos_token_ids, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    closing = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in (b'"', b"}", b"]")]
    while True:
        draft_token_ids = (
            tuple(torch.randint(tokenizer.vocab_size, (3,), generator=generator).tolist()) if drafts else ()
        )
        logits = torch.randn(1 + len(draft_token_ids), tokenizer.vocab_size, generator=generator)
        logits[:, closing] += 3
        logits[:, -5:] += 20  # padding
        logits[:, list(tokenizer.special_token_ids)] += 20
        [sampled] = sampler.sample(logits, [SamplingRows(request, draft_token_ids)])
        truncation = checker.push(sampled.token_ids)
        request.output_token_ids += sampled.token_ids[: truncation.num_kept]
        if truncation.finish_reason is not None:
            return tokenizer.decode(request.output_token_ids), truncation.finish_reason


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 0.6, "presence_penalty": 1.0}])
def test_output_satisfies_the_schema(
    tokenizer: Tokenizer, compiler: GrammarCompiler, drafts: bool, changes: dict[str, Any]
) -> None:
    for seed in range(8):
        text, finish_reason = generate(tokenizer, compiler, seed, drafts, grammar=PERSON, **changes)
        if finish_reason == "stop":
            Person.model_validate_json(text)
        else:
            assert finish_reason == "length"
            assert text.lstrip()[:1] in ("", "{")
    assert generate(tokenizer, compiler, 1, drafts, grammar=PERSON)[1] == "stop"


def test_json_object_is_an_object_with_anything_in_it(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    finished = [generate(tokenizer, compiler, seed, False, grammar=JSON_OBJECT) for seed in range(12)]
    objects = [json.loads(text) for text, finish_reason in finished if finish_reason == "stop"]
    assert len(objects) >= 6
    assert all(isinstance(value, dict) for value in objects)
    assert any(objects)


def test_after_the_grammar_only_end_tokens_remain(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Also with ``ignore_eos`` and ``min_tokens``, and with drafts past the end."""
    [end] = tokenizer.eos_token_ids
    sampling = SamplingParams(
        max_tokens=9, seed=0, temperature=0.0, min_tokens=9, grammar=Grammar("json_schema", '{"const": 1}')
    )
    request = make_request(sampling)
    sampler = Sampler(tokenizer.eos_token_ids)
    sampler.add(request, compiler.compile(Grammar("json_schema", '{"const": 1}')).result())
    [one] = tokenizer.encode("1")
    logits = torch.randn(5, tokenizer.vocab_size)
    [sampled] = sampler.sample(logits, [SamplingRows(request, (one, end, end, one))])
    assert sampled.token_ids == [one, end, end, end]
    request.output_token_ids += sampled.token_ids
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
        (json.dumps({"enum": ["x" * 70_000]}), "longer than"),
        ('{"items":' * 51 + "{}" + "}" * 51, "50 levels"),
        ('{"items":' * 5000 + "{}" + "}" * 5000, "valid JSON"),
        ('{"const": ' + "9" * 400 + "}", "cannot be used"),
        (json.dumps({"type": "string", "pattern": "x" * 1001}), "1000 characters"),
        (json.dumps({"type": "string", "pattern": "(" * 60 + "x" + ")" * 60}), "50 levels"),
        (json.dumps({"type": "string", "pattern": "a{0,9999}"}), "more than 2000"),
        (
            json.dumps({"properties": {f"{i}": {"type": "string", "pattern": "(ab){1,30}"} for i in range(50)}}),
            "more than 2000",
        ),
        (json.dumps({"type": "object", "patternProperties": {"((a{9}){9}){99}": {}}}), "more than 2000"),
        (
            json.dumps({"properties": {f"{i}": {"type": "string", "maxLength": 300 + i} for i in range(5)}}),
            "too many different lengths",
        ),
        (
            json.dumps({"prefixItems": [{"type": "string", "minLength": i} for i in range(50)]}),
            "they are 1225, more than 600",
        ),
        (json.dumps(strings(501) | {"additionalProperties": True}), "501 properties beside additionalProperties"),
        (json.dumps(strings(1001)), "too many optional properties"),
        (json.dumps(strings(101) | {"minProperties": 1}), "too many optional properties"),
        (json.dumps({"prefixItems": [strings(60) | {"maxProperties": 9}] * 3}), "too many optional properties"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(compiler: GrammarCompiler, schema: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message.replace("$", r"\$")):
        compiler.compile(Grammar(kind="json_schema", schema=schema)).result()


def test_property_names_are_not_keywords() -> None:
    check_json_schema('{"type": "object", "properties": {"not": {"type": "string"}, "if": true}, "description": "x"}')


@pytest.mark.parametrize(
    "schema",
    [
        strings(1000, maxLength=5000),
        {**strings(1500), "required": [f"{i}" for i in range(1500)]},
        {**strings(60), "required": ["1"], "additionalProperties": True, "maxProperties": 100},
        {"prefixItems": [{"type": "string", "maxLength": length} for length in (20, 100, 500, 2000, 10_000)]},
        {"type": "array", "maxItems": 10_000, "items": {"type": "string", "maxLength": 100}},
        {"properties": {"maxLength": True, "minLength": {}}, "required": 3, "minProperties": "x"},
    ],
)
def test_large_schemas_that_compile_fast_are_not_refused(schema: dict[str, Any]) -> None:
    check_json_schema(json.dumps(schema, separators=(",", ":")))


def test_a_compiled_grammar_is_kept_and_the_oldest_dropped(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    grammars = [Grammar("json_schema", json.dumps({"const": i})) for i in range(100)]
    first = compiler.compile(grammars[0])
    assert compiler.compile(Grammar("json_schema", json.dumps({"const": 0}))) is first
    for grammar in grammars:
        compiler.compile(grammar).result()
    assert compiler.compile(grammars[0]) is not first


def test_compiled_grammars_are_dropped_by_what_they_take(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer)
    small, large = (Grammar("json_schema", json.dumps({"type": "string", "maxLength": length})) for length in (1, 100))
    first, other = compiler.compile(small), compiler.compile(large)
    monkeypatch.setattr(grammar_module, "_MAX_CACHED_BYTES", other.result().num_bytes + first.result().num_bytes // 2)
    assert compiler.compile(large) is other, "the one wanted stays"
    assert compiler.compile(small) is not first


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("^[a-z(]{8}-x{2,4}$", 13),
        (r"\{3\((ab|c){2}d", 10),
        ("a*b+c?", 3),
        ("((a{2}){3}b){4}", 28),
        ("x{,5}y{7,}", 12),
        ("a{2", 2),
        (".*{1999}", 1999),
        ("x+?{30}", 30),
        (".{80}{80}", 6400),
        ("(ab?{3}){2}", 8),
        (")(", 1),
    ],
)
def test_size_of_a_pattern(pattern: str, size: int) -> None:
    assert pattern_size(pattern) == size


def test_more_schemas_than_are_kept_do_not_hold_up_the_loop(tokenizer: Tokenizer) -> None:
    """Each is compiled once, and none is waited for."""
    compiler = GrammarCompiler(tokenizer)
    waiting = CompilingRequests(compiler)
    requests = [
        make_request(SamplingParams(max_tokens=1, seed=0, grammar=Grammar("json_schema", f'{{"const": {i}}}')), str(i))
        for i in range(100)
    ]
    for request in requests:
        waiting.add(request)
    taken = []
    while len(waiting):
        taken += waiting.take_ready()
        time.sleep(0.01)
    assert {request.request_id for request, _ in taken} == {str(i) for i in range(100)}
    assert all(compiled.result().matcher() for _, compiled in taken)


def test_tenants_take_turns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a schema that the other tenant asked for first."""
    compiler = GrammarCompiler(tokenizer)
    begun, begin, compiled = threading.Event(), threading.Event(), []

    def compile_slowly(grammar: Grammar) -> None:
        begun.set()
        begin.wait()
        compiled.append(grammar.schema)

    monkeypatch.setattr(compiler, "_compile", compile_slowly)
    waiting = CompilingRequests(compiler)
    for tenant, schemas in (("many", range(20)), ("few", (100, 19))):
        for schema in schemas:
            sampling = SamplingParams(max_tokens=1, seed=0, grammar=Grammar("json_schema", str(schema)))
            waiting.add(make_request(sampling, f"{tenant} {schema}", tenant))
        assert begun.wait(10)
    begin.set()
    while len(waiting):
        waiting.take_ready()
        time.sleep(0.001)
    assert compiled == ["0", "100", "1", "19", *map(str, range(2, 19))]


def test_a_grammar_that_nobody_waits_for_is_not_compiled(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    waiting = CompilingRequests(compiler)
    slow, wanted = (
        Grammar("json_schema", '{"type": "string", "maxLength": 500}'),
        Grammar("json_schema", '{"const": 1}'),
    )
    for name, grammar in (("slow", slow), ("first", wanted), ("second", wanted)):
        waiting.add(make_request(SamplingParams(max_tokens=1, seed=0, grammar=grammar), name))
    compiled = compiler.compile(wanted)
    waiting.forget("first")
    assert not compiled.cancelled()
    waiting.forget("second")
    assert compiled.cancelled() or compiled.done()
    assert list(waiting) == ["slow"]
    assert compiler.compile(wanted).result().matcher()


def test_one_request_that_cannot_go_on_ends_alone(tmp_path: Path) -> None:
    """A dead end, a schema that xgrammar chokes on, and penalties that overflow, beside a request like any other."""
    engine = Engine(make_directory(tmp_path / "model"), Setting())
    prompt = list(range(100))

    def schema(value: object) -> Grammar:
        return Grammar("json_schema", json.dumps(value))

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
    assert reasons == {"dead end": ("error", "invalid"), "choked": ("error", "invalid")}
    assert ends["plain"].finish_reason == "length"


def _refuse(core: EngineCore, sampling: SamplingParams) -> EngineOutput:
    core.add(b"client", EngineRequest(request_id="refused", prompt_token_ids=[1], sampling=sampling, tenant="tests"))
    while True:
        outputs, _ = core.step()
        for output in outputs[b"client"]:
            return output
        time.sleep(0.001)


@pytest.mark.parametrize("kind", ["invalid", "internal"])
def test_refused_requests_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The compiler keeps why it failed, which must not keep those who asked."""
    failed: Future[CompiledGrammar] = Future()
    failed.set_exception(GrammarError("no") if kind == "invalid" else RuntimeError("no"))
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *_: failed)
    core = Engine(make_directory(tmp_path / "model"), Setting()).core
    sampling = SamplingParams(max_tokens=1, seed=0, grammar=JSON_OBJECT)
    assert [_refuse(core, sampling).error_kind for _ in range(3)] == [kind] * 3
    gc.collect()
    # Not isinstance, which asks each object's properties.
    assert not [each for each in gc.get_objects() if type(each) is Request and each.request_id.endswith("/refused")]
