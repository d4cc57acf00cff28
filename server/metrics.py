"""Prometheus metrics of the server and, passed on by it, of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest

from evospec.engine.config import MAX_SPECULATIVE_TOKENS
from evospec.engine.messages import VocabularyCounts
from evospec.server.engine_metrics import EngineMetrics
from evospec.server.metric_families import MetricFamilies, value_of
from evospec.server.schemas.overview import DomainOverview, Place, TenantOverview
from evospec.server.vllm_metrics import WithVllmNames

MAX_TENANT_LABELS = 100
MAX_DOMAIN_LABELS = 10  # for each tenant, so that none can use up the others'
OTHER = "other"
NO_DOMAIN = ""  # of requests without a session, and of sessions without a domain
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SESSION_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TOKENS = [2**i for i in range(18)]
FINISH_REASONS = ("stop", "length")
_TAIL_TOKENS = (0, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
_HISTOGRAMS: Mapping[str, tuple[str, str, Sequence[float]]] = {
    "ttft": ("time_to_first_token_seconds", "From the tokenised request to the first token of a sequence.", _SECONDS),
    "inter_token": ("inter_token_latency_seconds", "Seconds a token between two outputs of a sequence.", _SECONDS),
    "e2e": ("e2e_request_latency_seconds", "From the tokenised request to its last token.", _SECONDS),
    "queue": ("request_queue_time_seconds", "From a sequence's arrival in the engine until it runs.", _SECONDS),
    "prefill": ("request_prefill_time_seconds", "From there to its first token.", _SECONDS),
    "decode": ("request_decode_time_seconds", "From its first token to its last.", _SECONDS),
    "token": ("request_time_per_output_token_seconds", "Seconds a token of a sequence, after its first.", _SECONDS),
    "prompt_tokens": ("request_prompt_tokens", "Of a sequence.", _TOKENS),
    "generation_tokens": ("request_generation_tokens", "Of a sequence.", _TOKENS),
    "most_generation_tokens": ("request_max_num_generation_tokens", "Of the longest of a prompt's sequences.", _TOKENS),
}
"""Of requests, by the name that ``TenantMetrics.observe`` takes."""


class BoundedLabels:
    """Bounds the number of tenants, or of a tenant's domains, that have time series of their own."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def label(self, value: str) -> str:
        """``value`` for the first ``limit`` values seen, ``other`` for later ones."""
        if value not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(value)
        return value


class TenantMetrics:
    """Children of the labelled metrics for one tenant and domain, looked up once a request instead of once a token.

    ``tenant`` and ``domain`` are label values.
    """

    def __init__(self, metrics: Metrics, tenant: str, domain: str) -> None:
        labels = (metrics.model, tenant)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self._histograms = {name: each.labels(*labels) for name, each in metrics.histograms.items()}
        self.finished = {reason: metrics.finished.labels(*labels, reason) for reason in FINISH_REASONS}
        metrics.disconnects.labels(*labels)  # shown as 0 from the start
        self._metrics = metrics
        self._labels = (*labels, domain)
        self._num_drafts = metrics.num_drafts.labels(*self._labels)
        self._num_draft_tokens = metrics.num_draft_tokens.labels(*self._labels)
        self._num_accepted_tokens = metrics.num_accepted_tokens.labels(*self._labels)
        self._num_copied_tokens = metrics.num_copied_tokens.labels(*self._labels)
        self._num_accepted_copied_tokens = metrics.num_accepted_copied_tokens.labels(*self._labels)
        self._by_position: list[tuple[Counter, Counter]] = []
        self._coverage: tuple[Counter, Counter] | None = None
        """Of verified and of covered tokens; None, and no series, while no sequence had a vocabulary."""
        self._tail_hits: dict[str, Counter] = {}

    def observe(self, histogram: str, value: float) -> None:
        self._histograms[histogram].observe(value)

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int, copied: bool) -> None:
        """Count a step of a sequence that verified drafts, ``copied`` from its text or the draft's own."""
        self._num_drafts.inc()
        self._num_draft_tokens.inc(num_draft_tokens)
        self._num_accepted_tokens.inc(num_accepted_tokens)
        if copied:
            self._num_copied_tokens.inc(num_draft_tokens)
            self._num_accepted_copied_tokens.inc(num_accepted_tokens)
        num_positions = min(num_draft_tokens, MAX_SPECULATIVE_TOKENS)  # what is beyond is copied
        for position in range(len(self._by_position), num_positions):  # positions never drafted have no series
            labels = (*self._labels, str(position))
            drafted = self._metrics.num_draft_tokens_per_pos.labels(*labels)
            self._by_position.append((drafted, self._metrics.num_accepted_tokens_per_pos.labels(*labels)))
        for position, (drafted, accepted) in enumerate(self._by_position[:num_positions]):
            drafted.inc()
            if position < num_accepted_tokens:
                accepted.inc()

    def observe_vocabulary(self, counts: VocabularyCounts) -> None:
        metrics, labels = self._metrics, self._labels
        metrics.tail_tokens.labels(*labels).observe(counts.tail_tokens)
        verified, covered = self._coverage = (
            metrics.verified_tokens.labels(*labels),
            metrics.covered_tokens.labels(*labels),
        )
        verified.inc(counts.verified_tokens)
        covered.inc(counts.covered_tokens)
        metrics.retrieval_events.labels(*labels).inc(counts.events)
        for source, count in counts.insertions.items():
            metrics.tail_insertions.labels(*labels, source).inc(count)
        for source, count in counts.hits.items():
            self._tail_hits[source] = metrics.tail_hits.labels(*labels, source)
            self._tail_hits[source].inc(count)

    def overview(self) -> DomainOverview:
        verified, covered = (0, 0) if self._coverage is None else map(value_of, self._coverage)
        return DomainOverview(
            domain=self._labels[2],
            drafts=value_of(self._num_drafts),
            draft_tokens=value_of(self._num_draft_tokens),
            accepted_tokens=value_of(self._num_accepted_tokens),
            copied_tokens=value_of(self._num_copied_tokens),
            accepted_copied_tokens=value_of(self._num_accepted_copied_tokens),
            places=[Place(*map(value_of, counters)) for counters in list(self._by_position)],
            verified_tokens=verified,
            covered_tokens=covered,
            tail_hits={source: value_of(counter) for source, counter in self._tail_hits.copy().items()},
        )


class Metrics:
    """All metrics of one app, in a registry of its own. ``model`` is a label of the per-tenant ones."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.tenants = BoundedLabels(MAX_TENANT_LABELS)
        self.registry = CollectorRegistry()
        self._domains: dict[str, BoundedLabels] = {}
        self._per_domain: dict[tuple[str, str], TenantMetrics] = {}
        self._renders = asyncio.Lock()
        self._define_request_metrics(MetricFamilies(self.registry, "", ("model", "tenant")))
        of_domain = ("model", "tenant", "domain")
        self._define_speculation_metrics(MetricFamilies(self.registry, "spec_decode_", of_domain))
        self._define_vocabulary_metrics(MetricFamilies(self.registry, "vocab_", of_domain))
        self._define_session_metrics(MetricFamilies(self.registry, "session_", of_domain))
        self.engine = EngineMetrics(self.registry, self.tenants.label)

    def _define_request_metrics(self, families: MetricFamilies) -> None:
        counter = families.counter
        self.requests = counter("requests", "HTTP requests.", "endpoint", "status")
        self.disconnects = counter("client_disconnects", "Requests whose client went away.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens admitted.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.histograms = {name: families.histogram(*about) for name, about in _HISTOGRAMS.items()}
        self.finished = counter("request_success", "Sequences that came to their end.", "finished_reason")

    def _define_speculation_metrics(self, families: MetricFamilies) -> None:
        """vLLM's schema; ``num_draft_tokens_per_pos`` is ours, since the length of a draft varies."""
        counter = families.counter
        self.num_drafts = counter("num_drafts", "Drafts verified: one for a sequence and step.")
        self.num_draft_tokens = counter("num_draft_tokens", "Draft tokens verified.")
        self.num_accepted_tokens = counter("num_accepted_tokens", "Draft tokens accepted.")
        about = "Draft tokens verified that were copied from the text, not drafted."
        self.num_copied_tokens = counter("num_copied_tokens", about)
        self.num_accepted_copied_tokens = counter("num_accepted_copied_tokens", "Copied ones accepted.")
        self.num_draft_tokens_per_pos = counter("num_draft_tokens_per_pos", "Draft tokens by position.", "position")
        about = "Accepted ones by position."
        self.num_accepted_tokens_per_pos = counter("num_accepted_tokens_per_pos", about, "position")

    def _define_vocabulary_metrics(self, families: MetricFamilies) -> None:
        """What sequences report of their draft vocabularies when they end."""
        counter = families.counter
        about = "Tokens in a sequence's tail when it ends."
        self.tail_tokens = families.histogram("tail_tokens", about, _TAIL_TOKENS)
        about = "Tokens generated by sequences with a vocabulary of their own."
        self.verified_tokens = counter("verified_tokens", about)
        self.covered_tokens = counter("covered_tokens", "Those of them that could have been drafted.")
        self.retrieval_events = counter("events", "Steps that verified a token which could not have been drafted.")
        self.tail_insertions = counter("insertions", "Tokens put into tails, by what named them.", "source")
        self.tail_hits = counter("hits", "Accepted draft tokens from tails, by what had put them there.", "source")

    def _define_session_metrics(self, families: MetricFamilies) -> None:
        about = "Time to load or save a session, or of another operation on it."
        self.session_seconds = families.histogram("seconds", about, _SESSION_SECONDS, "operation")
        about = "Operations on sessions by what came of them; unavailable: Redis was down or slow."
        self.session_operations = families.counter("operations", about, "operation", "outcome")
        about = "Snapshots thrown away, on the way in from Redis (load) or on the way there (save)."
        self.dropped_snapshots = families.counter("snapshots_dropped", about, "operation", "reason")

    def labels(self, tenant: str, domain: str) -> tuple[str, str]:
        """The values of the labels ``tenant`` and ``domain``."""
        tenant = self.tenants.label(tenant)
        if domain != NO_DOMAIN:
            domain = self._domains.setdefault(tenant, BoundedLabels(MAX_DOMAIN_LABELS)).label(domain)
        return tenant, domain

    def for_tenant(self, tenant: str, domain: str = NO_DOMAIN) -> TenantMetrics:
        """The per-token metrics of ``tenant``'s sessions in ``domain``."""
        labels = self.labels(tenant, domain)
        if labels not in self._per_domain:
            self._per_domain[labels] = TenantMetrics(self, *labels)
        return self._per_domain[labels]

    def overview(self, tenant: str | None) -> list[TenantOverview]:
        """A tenant's traffic, nothing where it shares its label with others; None: that of all."""
        domains: dict[str, list[TenantMetrics]] = {}
        for (name, _), of_domain in sorted(self._per_domain.copy().items()):
            if tenant is None or (name == tenant and name != OTHER):
                domains.setdefault(name, []).append(of_domain)
        return [
            TenantOverview(
                tenant=name,
                prompt_tokens=value_of(own[0].prompt_tokens),
                generation_tokens=value_of(own[0].generation_tokens),
                domains=[one.overview() for one in own],
            )
            for name, own in domains.items()
        ]

    def observe_session(self, operation: str, outcome: str, seconds: float, tenant: str, domain: str) -> None:
        labels = (self.model, *self.labels(tenant, domain))
        self.session_operations.labels(*labels, operation, outcome).inc()
        self.session_seconds.labels(*labels, operation).observe(seconds)

    def observe_dropped_snapshot(self, operation: str, reason: str, tenant: str, domain: str) -> None:
        self.dropped_snapshots.labels(self.model, *self.labels(tenant, domain), operation, reason).inc()

    async def render_beside(self) -> bytes:
        """What ``render`` gives, made in a thread, one after the other: with many tenants it takes seconds."""
        async with self._renders:
            return await asyncio.to_thread(self.render)

    def render(self) -> bytes:
        """The exposition format: this app's metrics, as vLLM calls them, and of the process (rate limits, memory)."""
        return generate_latest(WithVllmNames(self.registry, self.model)) + generate_latest(REGISTRY)
