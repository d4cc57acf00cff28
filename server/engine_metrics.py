"""Metrics of the engine: what it runs on, its gauges and counters, and the times of its steps."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from evospec.engine.messages import EngineOutputs, EngineReady, EngineStats, StepTimings
from evospec.server.alignment_metrics import AlignmentMetrics
from evospec.server.metric_families import EngineCounters, MetricFamilies, value_of
from evospec.server.schemas.overview import EngineOverview

_STEP_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_VOCABULARY_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_GAUGES = {
    "num_running": ("num_requests_running", "Sequences in the batch."),
    "num_waiting": ("num_requests_waiting", "Sequences queued in the engine."),
    "blocks_used": ("kv_blocks_used", "KV cache blocks in use."),
    "blocks_total": ("kv_blocks_total", "KV cache blocks."),
    "vocabularies_used": ("vocabularies_used", "Running sequences with a vocabulary of their own."),
    "vocabularies_total": ("vocabularies_total", "How many can have one at once."),
}
"""By their field of ``EngineStats``."""
_COUNTERS = {
    "prefix_query_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "preemptions": ("preemptions", "Sequences preempted for lack of blocks or places."),
    "nonfinite_sequences": ("nonfinite_sequences", "Sequences ended by logits that are not finite."),
    "failed_steps": ("failed_steps", "Steps that the model could not compute; the requests in them ended."),
    "snapshots_refused": ("vocab_snapshots_refused", "Sessions that started cold in the engine."),
}
"""By their field of ``EngineStats``."""


class EngineMetrics:
    """All that the engine reports of itself. ``tenant_label``: the value of the label ``tenant`` for a tenant."""

    def __init__(self, registry: CollectorRegistry, tenant_label: Callable[[str], str]) -> None:
        families = MetricFamilies(registry)
        gauge, histogram = families.gauge, families.histogram
        self.up = gauge("engine_up", "1 if the engine is ready.")
        self.restarts = families.counter("engine_restarts", "Engine processes replaced.")
        about = (
            "1 for what the engine runs on ('torch' on a CPU is the slow fallback) and the draft that proposes tokens."
        )
        self._info = gauge("engine_info", about, "dtype", "attention_backend", "draft")
        self._kv_bytes = gauge("kv_cache_bytes", "Size of the target's KV cache.")
        self._draft_bytes = gauge("draft_bytes", "Weights and KV cache of the draft.")
        self._gauges = {name: gauge(*about) for name, about in _GAUGES.items()}
        self._waiting_by_tenant = gauge("num_requests_waiting_by_tenant", "Sequences queued in the engine.", "tenant")
        self._faults = families.counter(
            "optional_part_faults", "Faults of parts that only make the engine faster; no request ends by them.", "part"
        )
        self._off = gauge("optional_part_off", "1 if the part is switched off, after several faults.", "part")
        self._last_faults: dict[str, int] = {}
        self.switched_off: list[str] = []
        """Parts that only make the engine faster, and are switched off after several faults, by name."""
        self._counters = EngineCounters({name: families.counter(*about) for name, about in _COUNTERS.items()})
        step_seconds = histogram(
            "engine_step_seconds",
            "Time of an engine step by part: draft, verify (the model's pass), sample, overhead (the rest); total.",
            _STEP_SECONDS,
            "part",
        )
        self._vocabulary_seconds = histogram(
            "vocab_step_seconds",
            "Part of a step's draft time in which vocabularies and priors follow what was verified.",
            _VOCABULARY_SECONDS,
        )
        self._step_tokens = histogram("engine_step_tokens", "Tokens computed in a step.", [2**i for i in range(14)])
        self._step_parts = [step_seconds.labels(part) for part in ("draft", "verify", "sample", "overhead", "total")]
        self.alignment = AlignmentMetrics(registry)
        self._tenant_label = tenant_label
        self._epoch: str | None = None

    def observe_ready(self, info: EngineReady) -> None:
        self._info.clear()
        self._info.labels(info.dtype, info.attention_backend, info.draft or "none").set(1)
        self._kv_bytes.set(info.kv_bytes)
        self._draft_bytes.set(info.draft_bytes)

    def observe(self, message: EngineOutputs) -> None:
        """Take over gauges, counters and step timings that came with a step's outputs."""
        if message.epoch != self._epoch:
            self._epoch = message.epoch
            self._counters.restart()
            self._last_faults = {}
            self.alignment.counters.restart()
        if message.stats is not None:
            self._observe_stats(message.stats)
        for step in message.steps:
            self._observe_step(step)

    def load(self) -> EngineOverview:
        names = ("num_running", "num_waiting", "blocks_used", "blocks_total")
        running, waiting, used, total = (value_of(self._gauges[name]) for name in names)
        return EngineOverview(running=running, waiting=waiting, kv_blocks_used=used, kv_blocks_total=total)

    def lost(self) -> None:
        """There is no engine that runs, queues or holds anything."""
        for name in ("num_running", "num_waiting", "blocks_used", "vocabularies_used"):
            self._gauges[name].set(0)
        self._waiting_by_tenant.clear()

    def _observe_stats(self, stats: EngineStats) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        self._counters.follow(stats)
        self._follow_faults(stats)
        if stats.alignment is not None:
            self.alignment.observe_engine(stats.alignment)
        self._waiting_by_tenant.clear()
        for tenant, count in stats.waiting_by_tenant.items():
            self._waiting_by_tenant.labels(self._tenant_label(tenant)).inc(count)

    def _follow_faults(self, stats: EngineStats) -> None:
        for part, count in stats.faults.items():
            self._faults.labels(part).inc(max(0, count - self._last_faults.get(part, 0)))
            self._off.labels(part).set(part in stats.switched_off)
        self._last_faults, self.switched_off = stats.faults, stats.switched_off

    def _observe_step(self, step: StepTimings) -> None:
        seconds = [step.draft, step.forward, step.sample, step.schedule + step.commit]
        for part, value in zip(self._step_parts, [*seconds, sum(seconds)], strict=True):
            part.observe(value)
        if step.vocabulary:
            self._vocabulary_seconds.observe(step.vocabulary)
        self._step_tokens.observe(step.num_tokens)
