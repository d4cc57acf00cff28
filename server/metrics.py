"""Prometheus metrics of the server and, passed on by it, of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.messages import EngineOutputs, EngineReady, EngineStats, StepTimings, VocabularyCounts
from server.alignment_metrics import AlignmentMetrics
from server.vocabulary_metrics import VocabularyMetrics

MAX_TENANT_LABELS = 100
MAX_DOMAIN_LABELS = 10  # for each tenant, so that none can use up the others'
OTHER = "other"
NO_DOMAIN = ""  # of requests without a session, and of sessions without a domain
_COUNTERS = (
    "prefix_query_tokens", "prefix_hit_tokens", "preemptions", "nonfinite_sequences",
    "snapshots_refused", "semantic_queries", "semantic_seconds",
)  # fmt: skip
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SESSION_SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_STEP_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


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
        self.ttft = metrics.ttft.labels(*labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(*labels)
        self.e2e_latency = metrics.e2e_latency.labels(*labels)
        metrics.disconnects.labels(*labels)  # shown as 0 from the start
        self._metrics = metrics
        self._domain_labels = (*labels, domain)
        self._num_drafts = metrics.num_drafts.labels(*self._domain_labels)
        self._num_draft_tokens = metrics.num_draft_tokens.labels(*self._domain_labels)
        self._num_accepted_tokens = metrics.num_accepted_tokens.labels(*self._domain_labels)
        self._num_copied_tokens = metrics.num_copied_tokens.labels(*self._domain_labels)
        self._num_accepted_copied_tokens = metrics.num_accepted_copied_tokens.labels(*self._domain_labels)
        self._by_position: list[tuple[Counter, Counter]] = []

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int, copied: bool) -> None:
        """Count a step of a sequence that verified drafts, ``copied`` from its text or the draft's own."""
        self._num_drafts.inc()
        self._num_draft_tokens.inc(num_draft_tokens)
        self._num_accepted_tokens.inc(num_accepted_tokens)
        if copied:
            self._num_copied_tokens.inc(num_draft_tokens)
            self._num_accepted_copied_tokens.inc(num_accepted_tokens)
        for position in range(len(self._by_position), num_draft_tokens):  # positions never drafted have no series
            labels = (*self._domain_labels, str(position))
            drafted = self._metrics.num_draft_tokens_per_pos.labels(*labels)
            self._by_position.append((drafted, self._metrics.num_accepted_tokens_per_pos.labels(*labels)))
        for position, (drafted, accepted) in enumerate(self._by_position[:num_draft_tokens]):
            drafted.inc()
            if position < num_accepted_tokens:
                accepted.inc()

    def observe_vocabulary(self, counts: VocabularyCounts) -> None:
        """Count the draft vocabulary of a sequence that has ended."""
        self._metrics.vocabulary.observe(counts, self._domain_labels)


class Metrics:
    """All metrics of one app, in a registry of its own. ``model`` is a label of the per-tenant ones."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.tenants = BoundedLabels(MAX_TENANT_LABELS)
        self.registry = CollectorRegistry()
        self._domains: dict[str, BoundedLabels] = {}
        self._per_domain: dict[tuple[str, str], TenantMetrics] = {}
        self._epoch: str | None = None
        self._last: dict[str, float] = dict.fromkeys(_COUNTERS, 0)
        self._define_request_metrics(["model", "tenant"])
        self._define_speculation_metrics(["model", "tenant", "domain"])
        self._define_session_metrics(["model", "tenant", "domain"])
        self.vocabulary = VocabularyMetrics(self.registry, ["model", "tenant", "domain"])
        self.alignment = AlignmentMetrics(self.registry)
        self._define_engine_metrics()

    def _define_request_metrics(self, labels: list[str]) -> None:
        registry = self.registry
        self.requests = Counter(
            "evospec:requests", "HTTP requests.", ["endpoint", "status", *labels], registry=registry
        )
        self.disconnects = Counter(
            "evospec:client_disconnects", "Requests whose client went away.", labels, registry=registry
        )
        self.prompt_tokens = Counter("evospec:prompt_tokens", "Prompt tokens admitted.", labels, registry=registry)
        self.generation_tokens = Counter("evospec:generation_tokens", "Tokens generated.", labels, registry=registry)
        self.ttft = Histogram(
            "evospec:time_to_first_token_seconds",
            "From the tokenised request to the first token of a sequence.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "evospec:inter_token_latency_seconds",
            "Seconds a token between two outputs of a sequence.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self.e2e_latency = Histogram(
            "evospec:e2e_request_latency_seconds",
            "From the tokenised request to its last token.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )

    def _define_speculation_metrics(self, labels: list[str]) -> None:
        """vLLM's schema; ``num_draft_tokens_per_pos`` is ours, since the length of a draft varies."""
        registry = self.registry
        self.num_drafts = Counter(
            "evospec:spec_decode_num_drafts", "Drafts verified: one for a sequence and step.", labels, registry=registry
        )
        self.num_draft_tokens = Counter(
            "evospec:spec_decode_num_draft_tokens", "Draft tokens verified.", labels, registry=registry
        )
        self.num_accepted_tokens = Counter(
            "evospec:spec_decode_num_accepted_tokens", "Draft tokens accepted.", labels, registry=registry
        )
        self.num_copied_tokens = Counter(
            "evospec:spec_decode_num_copied_tokens",
            "Draft tokens verified that were copied from the text, not drafted.",
            labels,
            registry=registry,
        )
        self.num_accepted_copied_tokens = Counter(
            "evospec:spec_decode_num_accepted_copied_tokens", "Copied ones accepted.", labels, registry=registry
        )
        labels = [*labels, "position"]
        self.num_draft_tokens_per_pos = Counter(
            "evospec:spec_decode_num_draft_tokens_per_pos", "Draft tokens by position.", labels, registry=registry
        )
        self.num_accepted_tokens_per_pos = Counter(
            "evospec:spec_decode_num_accepted_tokens_per_pos", "Accepted ones by position.", labels, registry=registry
        )

    def _define_session_metrics(self, labels: list[str]) -> None:
        self.session_seconds = Histogram(
            "evospec:session_seconds",
            "Time to load or save a session, or of another operation on it.",
            ["operation", *labels],
            buckets=_SESSION_SECONDS,
            registry=self.registry,
        )
        self.session_operations = Counter(
            "evospec:session_operations",
            "Operations on sessions by what came of them; unavailable: Redis was down or slow.",
            ["operation", "outcome", *labels],
            registry=self.registry,
        )
        self.session_snapshots_dropped = Counter(
            "evospec:session_snapshots_dropped",
            "Snapshots thrown away, on the way in from Redis (load) or on the way there (save).",
            ["operation", "reason", *labels],
            registry=self.registry,
        )

    def _define_engine_metrics(self) -> None:
        registry = self.registry
        self.engine_up = Gauge("evospec:engine_up", "1 if the engine is ready.", registry=registry)
        self.engine_restarts = Counter("evospec:engine_restarts", "Engine processes replaced.", registry=registry)
        self.engine_info = Gauge(
            "evospec:engine_info",
            "1 for what the engine runs on ('torch' on a CPU is the slow fallback) and the draft that proposes tokens.",
            ["dtype", "attention_backend", "draft"],
            registry=registry,
        )
        self.kv_bytes = Gauge("evospec:kv_cache_bytes", "Size of the target's KV cache.", registry=registry)
        self.draft_bytes = Gauge("evospec:draft_bytes", "Weights and KV cache of the draft.", registry=registry)
        self.running = Gauge("evospec:num_requests_running", "Sequences in the batch.", registry=registry)
        self.waiting = Gauge("evospec:num_requests_waiting", "Sequences queued in the engine.", registry=registry)
        self.waiting_by_tenant = Gauge(
            "evospec:num_requests_waiting_by_tenant", "Sequences queued in the engine.", ["tenant"], registry=registry
        )
        self.blocks_used = Gauge("evospec:kv_blocks_used", "KV cache blocks in use.", registry=registry)
        self.blocks_total = Gauge("evospec:kv_blocks_total", "KV cache blocks.", registry=registry)
        self.engine_counters = {
            **self.vocabulary.engine_counters,
            "prefix_query_tokens": Counter(
                "evospec:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", registry=registry
            ),
            "prefix_hit_tokens": Counter(
                "evospec:prefix_cache_hits", "Prompt tokens found in the prefix cache.", registry=registry
            ),
            "preemptions": Counter(
                "evospec:preemptions", "Sequences preempted for lack of blocks or places.", registry=registry
            ),
            "nonfinite_sequences": Counter(
                "evospec:nonfinite_sequences", "Sequences ended by logits that are not finite.", registry=registry
            ),
        }
        self.step_seconds = Histogram(
            "evospec:engine_step_seconds",
            "Time of an engine step by part: draft, verify (the model's pass), sample, overhead (the rest); total.",
            ["part"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._step_parts = [self.step_seconds.labels(part) for part in ("draft", "verify", "sample", "overhead")]
        self._step_total = self.step_seconds.labels("total")
        self.step_tokens = Histogram(
            "evospec:engine_step_tokens",
            "Tokens computed in a step.",
            buckets=[2**i for i in range(14)],
            registry=registry,
        )

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

    def observe_session(self, operation: str, outcome: str, seconds: float, tenant: str, domain: str) -> None:
        """Count an operation on a session and its time."""
        labels = (self.model, *self.labels(tenant, domain))
        self.session_operations.labels(operation, outcome, *labels).inc()
        self.session_seconds.labels(operation, *labels).observe(seconds)

    def observe_dropped_snapshot(self, operation: str, reason: str, tenant: str, domain: str) -> None:
        """Count a snapshot that was thrown away."""
        self.session_snapshots_dropped.labels(operation, reason, self.model, *self.labels(tenant, domain)).inc()

    def observe_ready(self, info: EngineReady) -> None:
        """Show what the engine runs on."""
        self.engine_info.clear()
        self.engine_info.labels(info.dtype, info.attention_backend, info.draft or "none").set(1)
        self.kv_bytes.set(info.kv_bytes)
        self.draft_bytes.set(info.draft_bytes)

    def observe_engine(self, message: EngineOutputs) -> None:
        """Take over gauges, counters and step timings that came with a step's outputs."""
        if message.epoch != self._epoch:
            self._epoch = message.epoch
            self._last = dict.fromkeys(_COUNTERS, 0)
            self.alignment.engine_restarted()
        if message.stats is not None:
            self._observe_stats(message.stats)
        self._observe_steps(message.steps)

    def engine_lost(self) -> None:
        """There is no engine that runs, queues or holds anything."""
        for gauge in (self.running, self.waiting, self.blocks_used, self.vocabulary.used):
            gauge.set(0)
        self.waiting_by_tenant.clear()

    def _observe_stats(self, stats: EngineStats) -> None:
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.blocks_used.set(stats.blocks_used)
        self.blocks_total.set(stats.blocks_total)
        self.vocabulary.used.set(stats.vocabularies_used)
        self.vocabulary.total.set(stats.vocabularies_total)
        for name in _COUNTERS:
            value = getattr(stats, name)
            self.engine_counters[name].inc(max(0, value - self._last[name]))
            self._last[name] = value
        if stats.alignment is not None:
            self.alignment.observe_engine(stats.alignment)
        self.waiting_by_tenant.clear()
        for tenant, count in stats.waiting_by_tenant.items():
            self.waiting_by_tenant.labels(self.tenants.label(tenant)).inc(count)

    def _observe_steps(self, steps: Sequence[StepTimings]) -> None:
        for step in steps:
            seconds = (step.draft, step.forward, step.sample, step.schedule + step.commit)
            for part, value in zip(self._step_parts, seconds, strict=True):
                part.observe(value)
            self._step_total.observe(sum(seconds))
            if step.vocabulary:
                self.vocabulary.step_seconds.observe(step.vocabulary)
            self.step_tokens.observe(step.num_tokens)

    def render(self) -> Iterator[bytes]:
        """The exposition format: this app's metrics, then the process-wide ones (rate limits, Redis, memory)."""
        yield generate_latest(self.registry)
        yield generate_latest(REGISTRY)
