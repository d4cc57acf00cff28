"""The pure parts of the vocabulary benchmark: modes' names, order of requests, what runs come to."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.common.drafting import NONE, Drafting
from benchmarks.common.in_process import Generation
from benchmarks.prompts.build import Prompt
from benchmarks.vocabulary.modes import FULL, HARD_SWITCH, NANOSPEC, Sizes, make_mode
from benchmarks.vocabulary.pairs import compare, counts_of, mean
from benchmarks.vocabulary.parts import (
    LEARNING,
    NEW_TENANT,
    PARTS,
    RETURNING_SESSION,
    RETURNING_TENANT,
    SWITCH_DOMAINS,
    Plan,
)
from benchmarks.vocabulary.sessions import summarise
from benchmarks.vocabulary.summary import (
    coverage,
    references,
    round_speeds,
    settled_after,
    shares_at,
    summaries,
    switch_lengths,
)
from engine.config import MAX_TAIL_TOKENS
from engine.messages import VocabularyCounts

DRAFTING = Drafting("eagle3", None, 4, adaptive=False)
DOMAINS = ["code", "law", "medicine", "general"]
PROMPTS = {domain: [Prompt(f"{domain}{i}", domain, "eval", [], "", "", "") for i in range(40)] for domain in DOMAINS}  # type: ignore[arg-type]
OURS = "dynamic:2048+1024"


def plan(part: str, modes: list[str] | None = None) -> Plan:
    return Plan(part, "m", modes or [FULL, OURS], DOMAINS, 3, 8, 60.0, DRAFTING, 2, [1, 4, 8], 2)


def test_a_mode_is_a_vocabulary_and_switches() -> None:
    mode = make_mode(f"{OURS}/prior=off,graph=false,prior_order=2,cold", "smollm2-135m", DRAFTING, 17)
    speculation = mode.config.speculation
    assert (speculation.vocabulary, speculation.num_speculative_tokens, speculation.adaptive) == (OURS, 4, False)
    assert (speculation.dynamic.prior, speculation.dynamic.graph, speculation.dynamic.prior_order) == ("off", False, 2)
    assert mode.cold
    assert not make_mode(OURS, "smollm2-135m", DRAFTING, 17).cold
    assert make_mode(NONE, "smollm2-135m", DRAFTING, 17).config.speculation.method == "none"


@pytest.mark.parametrize("name", ["statik:5", f"{OURS}/prior=maybe", f"{OURS}/colour=red", "dynamic:5"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        make_mode(name, "smollm2-135m", DRAFTING, 17)


def test_others_methods_are_made_of_the_switches() -> None:
    fr_spec = make_mode("fr-spec:12288", "smollm2-135m", DRAFTING, 17).config.speculation
    assert (fr_spec.vocabulary, fr_spec.copies) == ("static:12288", False)
    nanospec = make_mode(NANOSPEC, "smollm2-135m", DRAFTING, 17)
    dynamic = nanospec.config.speculation.dynamic
    assert not nanospec.config.speculation.copies
    assert nanospec.config.speculation.vocabulary == f"dynamic:17+{MAX_TAIL_TOKENS}"
    assert 17 + MAX_TAIL_TOKENS < 3000
    assert (dynamic.in_context, dynamic.target_signal, dynamic.prior) == (True, "every", "off")
    assert not dynamic.graph
    assert not dynamic.semantic
    assert not dynamic.tenant_memory
    paper = make_mode("paper:12288", "smollm2-135m", DRAFTING, 17).config.speculation
    assert paper.vocabulary == "dynamic:12288+256"
    assert (paper.dynamic.target_signal, paper.dynamic.replacement, paper.dynamic.prior) == ("events", "arc", "off")
    assert paper.dynamic.semantic
    assert paper.dynamic.graph
    switch = make_mode(HARD_SWITCH, "smollm2-135m", DRAFTING, 17)
    speculation = switch.config.speculation
    assert (speculation.vocabulary, speculation.num_speculative_tokens, speculation.copies) == (FULL, 4, False)
    assert switch.switches


def test_all_default_modes_can_be_made() -> None:
    sizes = Sizes(17, 12288, (4096, 1024), OURS, ("dynamic:full+0",))
    names = [*sizes.modes(), *sizes.ablations(), *sizes.few()]
    assert {make_mode(name, "smollm2-135m", DRAFTING, 17).name for name in names} == set(names)
    assert len(set(sizes.ablations())) == len(sizes.ablations())


def test_a_round_has_one_request_of_each_domain_and_sessions_keep_to_theirs() -> None:
    units = list(PARTS["modes"](plan("modes"), PROMPTS))
    assert [(u.labels["round"], u.labels["domain"]) for u in units[:5]] == [*((0, d) for d in DOMAINS), (1, "code")]
    for unit in units:
        assert (unit.asks[0].session, unit.asks[0].domain) == (unit.labels["domain"],) * 2
    assert len({unit.asks[0].prompt.id for unit in units}) == len(units) == 12


def test_a_session_that_switches_goes_on_through_all_topics() -> None:
    units = list(PARTS["switch"](plan("switch"), PROMPTS))
    first = [unit for unit in units if unit.labels["session"] == 0]
    assert [unit.labels["place"] for unit in first] == list(range(9))
    assert [unit.labels["domain"] for unit in first[::3]] == list(SWITCH_DOMAINS)
    assert {unit.asks[0].session for unit in first} == {"session-0"}
    assert len({unit.asks[0].tenant for unit in units}) == 2
    assert len({unit.asks[0].prompt.id for unit in units}) == len(units)


def test_no_tenant_meets_a_prompt_twice_and_the_past_is_learned_first() -> None:
    units = list(PARTS["tenant"](plan("tenant"), PROMPTS))
    met = Counter((unit.asks[0].tenant, unit.asks[0].prompt.id) for unit in units)
    assert set(met.values()) == {1}
    kinds = [unit.labels["kind"] for unit in units]
    assert kinds.index(NEW_TENANT) == kinds.count(LEARNING) == 2 * 3 * 4
    asked = {kind: [u.asks[0] for u in units if u.labels["kind"] == kind] for kind in kinds}
    for kind in (RETURNING_TENANT, RETURNING_SESSION):
        assert [a.prompt for a in asked[kind]] == [a.prompt for a in asked[NEW_TENANT]]
    past = {ask.session for ask in asked[LEARNING]}
    assert {ask.session for ask in asked[RETURNING_SESSION]} <= past
    assert not past & {ask.session for ask in asked[RETURNING_TENANT] + asked[NEW_TENANT]}
    assert {ask.tenant for ask in asked[RETURNING_TENANT]} <= {ask.tenant for ask in asked[LEARNING]}
    assert len({ask.tenant for ask in asked[NEW_TENANT]}) == len(asked[NEW_TENANT])


def test_load_mixes_domains_and_repeats_no_prompt() -> None:
    units = list(PARTS["load"](plan("load"), PROMPTS))
    assert [unit.concurrency for unit in units] == [1, 4, 8] * 2
    for unit in units:
        assert len(unit.asks) == max(2 * unit.concurrency, 4)
        assert len({ask.max_tokens for ask in unit.asks}) > 1
        assert {ask.domain for ask in unit.asks} == set(DOMAINS)
        assert len({ask.session for ask in unit.asks}) == len(unit.asks)
        assert unit.whole
    prompts = [ask.prompt.id for ask in chain.from_iterable(unit.asks for unit in units)]
    assert len(set(prompts)) == len(prompts)
    levels = [{ask.session for ask in unit.asks} for unit in units[:3]]
    assert not levels[0] & levels[1]
    assert {ask.session for ask in units[3].asks} == levels[0]


def test_a_conversation_is_one_session() -> None:
    units = list(PARTS["bytes"](replace(plan("bytes"), prompts=25), PROMPTS))
    assert len(units) == 25
    assert {unit.asks[0].session for unit in units} == {"conversation"}
    assert [unit.labels["domain"] for unit in units[::10]] == ["code", "law", "medicine"]


def test_what_a_run_comes_to() -> None:
    counts = VocabularyCounts(tail_tokens=5, verified_tokens=10, covered_tokens=9, hits={"graph": 1, "target": 2})
    run = Generation([[1, 2], [3]], [b"abc", None], [counts, None], verified=[(4, 4), (2, 0)], seconds=2.0)
    result = summarise(run, 4, with_steps=False)
    assert (result["tokens"], result["verified"], result["covered"]) == (3, 10, 9)
    assert (result["snapshot_bytes"], result["hits"]) == ([3], {"graph": 1, "target": 2})
    assert result["acceptance"] == {"drafted": [1, 1, 1, 1], "accepted": [1, 1, 1, 1]}
    assert summarise(run, None, with_steps=True)["acceptance"]["drafted"] == [2, 2, 1, 1]


def run(mode: str, accepted: int, seconds: float = 1.0, **labels: Any) -> dict[str, Any]:
    """100 drafts of four tokens, of which ``accepted`` were accepted in their first place."""
    return (
        {
            "model": "m",
            "mode": mode,
            "tokens": 100,
            "seconds": seconds,
            "acceptance": {"drafted": [100] * 4, "accepted": [accepted, 0, 0, 0]},
            "verified": 100 if mode == OURS else 0,
            "covered": 90 if mode == OURS else 0,
            "hits": {"target": 3},
            "decode_tokens": 50,
            "decode_seconds": seconds**2,
            "decode_steps": 50,
            "retrieval_seconds": 0.05,
            "snapshot_bytes": [1000] if mode == OURS else [],
            "step_ms": [1.0, 2.0],
            "retrieval_ms": [0.1, 0.2],
            "noise": 0.0,
        }
        | {"domain": "code"}
        | labels
    )


def record(part: str, runs: list[dict[str, Any]], modes: list[str] | None = None) -> dict[str, Any]:
    the_plan = replace(plan(part, modes), domains=["code", "law"])
    return {"plan": the_plan.__dict__, "runs": runs}


def test_a_mode_is_compared_within_rounds_and_by_domain() -> None:
    runs = []
    for number, seconds in enumerate((1.0, 3.0)):
        for domain in ("code", "law"):
            runs += [
                run(NONE, 0, 4 * seconds, domain=domain, round=number),
                run(FULL, 50 if domain == "code" else 20, 2 * seconds, domain=domain, round=number),
                run(OURS, 80, seconds, domain=domain, round=number),
            ]
    _, full, ours = summaries(record("modes", runs, [NONE, FULL, OURS]))
    assert ours["lengths"] == pytest.approx({"code": 1.8, "law": 1.8})
    assert ours["shares_of_full"] == pytest.approx({"code": 1.2, "law": 1.5})
    assert ours["share_of_full"] == pytest.approx(1.35)
    assert ours["to"] == {NONE: [4.0, 4.0], FULL: [2.0, 2.0]}
    assert full["to"][NONE] == [2.0, 2.0]
    assert ours["decode_to"][FULL] == [4.0, 4.0]
    assert (ours["coverage"], full["coverage"]) == (0.9, None)
    assert ours["retrieval_ms"] == pytest.approx(1.0)
    json.dumps([full, ours], allow_nan=False)


def test_speed_is_of_the_domains_that_count() -> None:
    runs = [
        run(OURS, 50, seconds, domain=domain, round=number)
        for number, seconds in enumerate((1.0, 2.0))
        for domain in ("code", "law")
    ]
    of_code_and_law = record("modes", runs)
    assert round_speeds(of_code_and_law, OURS) == {0: 100.0, 1: 50.0}
    runs.append(run(OURS, 50, 100.0, domain="general", round=0))
    of_code_and_law["plan"]["domains"] = ["code", "law", "general"]
    assert round_speeds(of_code_and_law, OURS) == {0: 100.0, 1: 50.0}
    runs.pop(0)
    assert round_speeds(of_code_and_law, OURS) == {1: 50.0}


def test_all_are_compared_with_fr_specs_setting_and_nanospecs() -> None:
    assert references([FULL, "fr-spec:300", "static:100", NANOSPEC, OURS]) == [FULL, "fr-spec:300", NANOSPEC]
    assert references([OURS]) == []


def test_every_part_can_be_summed_up_even_when_cut_before_its_first_run() -> None:
    for part in PARTS:
        json.dumps(summaries(record(part, [])), allow_nan=False)


def test_after_a_switch_values_are_shares_of_the_full_heads() -> None:
    runs = []
    for place in range(8):
        domain = "law" if place < 4 else "code"
        runs.append(run(FULL, 20, domain=domain, place=place, session=0))
        runs.append(run(OURS, 20 if place == 4 else 80, domain=domain, place=place, session=0))
    cut = record("switch", runs)
    lengths = switch_lengths(cut, OURS)
    assert lengths[3] == pytest.approx(1.8)  # not smoothed with the next topic's
    assert lengths[4] == pytest.approx(1.6)
    rows = {(row["mode"], row["domain"]): row for row in summaries(cut)}
    assert rows[OURS, "code"]["first"] == pytest.approx(1.6 / 1.2)
    assert rows[OURS, "code"]["steady"] == pytest.approx(1.5)
    assert rows[OURS, "code"]["settled_after"] == 1
    assert rows[OURS, "law"]["settled_after"] == 0


@given(st.lists(st.floats(0.1, 10.0), min_size=1))
def test_it_always_settles_at_a_request_that_is_near_enough(values: list[float]) -> None:
    place = settled_after(values)
    assert place is not None
    steady = sum(values[len(values) // 2 :]) / len(values[len(values) // 2 :])
    assert values[place] >= 0.95 * steady
    assert all(value < 0.95 * steady for value in values[:place])
    assert settled_after([]) is None


def test_kinds_of_tenants_load_and_bytes() -> None:
    kinds = [run(OURS, 50, kind=NEW_TENANT), run(OURS, 80, kind=RETURNING_TENANT), run(OURS, 0, kind=LEARNING)]
    rows = summaries(record("tenant", [*kinds, run(FULL, 50, kind=NEW_TENANT)], [OURS]))
    assert [(row["kind"], row["hits"]) for row in rows] == [
        (NEW_TENANT, {"target": 3}),
        (RETURNING_TENANT, {"target": 3}),
    ]
    assert rows[0]["share_of_full"] == pytest.approx(1.0)
    assert rows[1]["share_of_full"] is None
    loads = [run(mode, 50, seconds, round=0, concurrency=8) for mode, seconds in ((FULL, 2.0), (OURS, 1.0))]
    of_load = {(row["mode"], row["concurrency"]): row for row in summaries(record("load", loads))}
    assert of_load[OURS, 8]["to"] == {FULL: [2.0]}
    assert of_load[OURS, 4]["tokens_per_second"] is None
    turns = [run(OURS, 20, round=0), run(OURS, 80, round=1, snapshot_bytes=[3000])]
    (row,) = summaries(record("bytes", turns, [OURS]))
    assert (row["first_bytes"], row["last_bytes"], row["turns"]) == (1000, 3000, 2)
    assert (row["early_length"], row["late_length"]) == pytest.approx((1.2, 1.8))


def test_the_standard_error_is_what_the_ratio_varies_by() -> None:
    """Of requests drawn again and again: the jackknife from one drawing tells how the ratios of all are spread."""
    rng = random.Random(0)

    def draw() -> tuple[dict[int, tuple[int, int]], dict[int, tuple[int, int]]]:
        drafts = [rng.randint(10, 40) for _ in range(60)]
        theirs = {number: (n, sum(rng.random() < 0.5 for _ in range(n))) for number, n in enumerate(drafts)}
        ours = {number: (n, accepted + rng.randint(0, 4)) for number, (n, accepted) in theirs.items()}
        return ours, theirs

    ratios = [ratio for ratio in (compare(*draw()) for _ in range(200)) if ratio is not None]
    middle = sum(ratio.value for ratio in ratios) / len(ratios)
    spread = math.sqrt(sum((ratio.value - middle) ** 2 for ratio in ratios) / len(ratios))
    assert ratios[0].error == pytest.approx(spread, rel=0.3)
    assert mean(ratios).error == pytest.approx(spread / math.sqrt(200), rel=0.1)


def test_only_requests_that_both_modes_answered_are_compared() -> None:
    ours, theirs = {0: (10, 10), 1: (10, 10), 2: (10, 0)}, {0: (10, 5), 1: (10, 5), 3: (10, 9)}
    ratio = compare(ours, theirs)
    assert ratio is not None
    assert (ratio.value, ratio.error) == pytest.approx((2.0 / 1.5, 0.0))
    assert compare(ours, {0: (10, 5)}) is None
    runs = [run(OURS, 30, round=7), run(FULL, 50, round=7), run(OURS, 40, round=8, domain="law")]
    assert counts_of(runs, OURS, "code") == {7: (100, 30)}


def test_shares_are_nearest_ranks() -> None:
    assert shares_at([3.0, 1.0, 2.0], (0.0, 0.5, 0.99)) == [1.0, 2.0, 3.0]
    assert shares_at([]) == []


def test_coverage_needs_a_vocabulary_that_follows() -> None:
    assert coverage([run(FULL, 1)]) is None
    assert coverage([run(OURS, 1), run(FULL, 1)]) == 0.9
