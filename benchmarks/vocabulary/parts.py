"""The parts of ``benchmarks.vocabulary``: which requests come in which order, of whom, in which session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, cycle, product

from benchmarks.common.drafting import Drafting
from benchmarks.common.in_process import REQUESTS_EACH, answer_lengths
from benchmarks.prompts.build import Prompt
from benchmarks.vocabulary.sessions import Ask, Unit

SWITCH_DOMAINS = ("law", "medicine", "code")
"""The topics of a session that changes its topic."""
NEW_TENANT, RETURNING_TENANT, RETURNING_SESSION, LEARNING = "new tenant", "returning tenant", "session", "learning"
MIXED = "mixed"
"""Instead of a domain: requests of all in one batch."""

PromptsByDomain = Mapping[str, Sequence[Prompt]]


@dataclass(frozen=True)
class Plan:
    """What one part measures. ``seconds`` is its bound, loading included.

    ``prompts``: of each domain (part ``bytes``: turns). ``sessions`` of part ``switch``; ``levels``, ``rounds`` and
    ``ignore_eos`` of part ``load``: the others' answers end by themselves. ``prompt_file``: where the prompts are from;
    None: the eval prompts.
    """

    part: str
    model: str
    modes: list[str]
    domains: list[str]
    prompts: int
    max_tokens: int
    seconds: float
    drafting: Drafting
    sessions: int
    levels: list[int]
    rounds: int
    ignore_eos: bool = True
    prompt_file: str | None = None


def of_domains(plan: Plan, prompts: PromptsByDomain) -> Iterator[Unit]:
    """A session for each domain, one request after another; a round has one request of each domain."""
    for number in range(plan.prompts):
        for domain in plan.domains:
            ask = Ask(prompts[domain][number % len(prompts[domain])], domain, f"tenant-{domain}", domain)
            yield Unit({"domain": domain, "round": number}, [ask], plan.max_tokens)


def of_switches(plan: Plan, prompts: PromptsByDomain) -> Iterator[Unit]:
    """Sessions that go through ``SWITCH_DOMAINS``; each is a tenant's only one, and has prompts of its own."""
    for session in range(plan.sessions):
        for stage, domain in enumerate(SWITCH_DOMAINS):
            for number in range(plan.prompts):
                place = session * plan.prompts + number
                ask = Ask(prompts[domain][place % len(prompts[domain])], f"session-{session}", f"tenant-{session}")
                labels = {"domain": domain, "session": session, "place": stage * plan.prompts + number}
                yield Unit(labels, [ask], plan.max_tokens)


def of_tenants(plan: Plan, prompts: PromptsByDomain) -> Iterator[Unit]:
    """The same prompts by a new tenant, by one who comes back, and in a session that goes on.

    The latter two are different tenants with the same past (as many other prompts), so that none has met a prompt
    before.
    """
    numbers = count()
    for number, domain in product(range(plan.prompts), plan.domains):
        for kind in (RETURNING_TENANT, RETURNING_SESSION):
            ask = Ask(prompts[domain][number], f"{kind}-{domain}-past", f"{kind}-{domain}", domain)
            yield Unit({"domain": domain, "kind": LEARNING}, [ask], plan.max_tokens)
    for number, domain in product(range(plan.prompts, 2 * plan.prompts), plan.domains):
        prompt, name = prompts[domain][number % len(prompts[domain])], f"new-{next(numbers)}"
        past = f"{RETURNING_SESSION}-{domain}"
        asks = {
            NEW_TENANT: Ask(prompt, name, name, domain),
            RETURNING_TENANT: Ask(prompt, f"{RETURNING_TENANT}-{name}", f"{RETURNING_TENANT}-{domain}", domain),
            RETURNING_SESSION: Ask(prompt, f"{past}-past", past, domain),
        }
        for kind, ask in asks.items():
            yield Unit({"domain": domain, "kind": kind}, [ask], plan.max_tokens)


def of_loads(plan: Plan, prompts: PromptsByDomain) -> Iterator[Unit]:
    """At each concurrency, sessions of all domains in one batch; no prompt comes twice while there are others.

    With ``ignore_eos`` answers have ``answer_lengths``.
    """
    supply = {domain: cycle(prompts[domain]) for domain in plan.domains}
    for number in range(plan.rounds):
        for level in plan.levels:
            size = max(REQUESTS_EACH * level, len(plan.domains))
            lengths = answer_lengths(size, plan.max_tokens) if plan.ignore_eos else [None] * size
            asks = [
                Ask(next(supply[domain]), f"{level}-{slot}", f"tenant-{domain}", domain, length)
                for slot, (domain, length) in enumerate(zip(cycle(plan.domains), lengths, strict=False))
            ]
            labels = {"domain": MIXED, "round": number, "concurrency": level}
            yield Unit(labels, asks, plan.max_tokens, concurrency=level, whole=plan.ignore_eos)


def of_conversation(plan: Plan, prompts: PromptsByDomain) -> Iterator[Unit]:
    """One conversation; the questions come from all domains in turn, ten from each."""
    questions = [
        prompts[domain][number]
        for start in range(0, plan.prompts, 10)
        for domain in plan.domains
        for number in range(start, min(start + 10, len(prompts[domain])))
    ]
    for number, question in enumerate(questions[: plan.prompts]):
        ask = Ask(question, "conversation", "tenant")
        labels = {"domain": question.domain, "round": number}
        yield Unit(labels, [ask], plan.max_tokens, conversation=True, with_steps=True)


PARTS: dict[str, Callable[[Plan, PromptsByDomain], Iterator[Unit]]] = {
    "modes": of_domains,
    "sources": of_domains,
    "switch": of_switches,
    "tenant": of_tenants,
    "load": of_loads,
    "bytes": of_conversation,
}
"""By name: the requests, unit by unit."""
