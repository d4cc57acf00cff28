"""Metrics of online alignment: what the engine logs and drafts with, and what the adapters worker reports."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from evospec.engine.messages import AlignmentStats
from evospec.engine.online.adapter_control import AdapterStatus, WorkerStatus
from evospec.server.metric_families import EngineCounters, MetricFamilies, value_of

_COUNTERS = {
    "steps": "Verify steps of drafted sequences.",
    "records_hard": "Of these, logged because they teach.",
    "records_sampled": "Of these, logged whatever happened in them.",
    "records_written": "Records that reached Redis.",
    "records_dropped_by_queue": "Records dropped because the queue was full, or their features could not be stored.",
    "records_dropped_by_redis": "Records dropped because Redis failed.",
    "loads": "Adapters that the engine took over.",
    "failed_loads": "Adapters that were damaged, or changed too fast to be read.",
}
_WORKER_GAUGES = {
    "is_paused": ("worker_paused", "1 if it has work and the machine is too busy for it."),
    "lag": ("worker_lag_records", "Records that it has not read yet."),
    "num_records": ("worker_num_records", "Records read since the worker started."),
    "num_lapsed": ("worker_num_lapsed", "Records whose features were overwritten before they were read."),
    "num_unusable": ("worker_num_unusable", "Records that could not be used."),
    "num_trimmed": ("worker_num_trimmed", "Records that left the stream before they were read."),
    "num_without_slot": ("worker_num_without_slot", "Records of keys for which there was no slot."),
    "resident_bytes": ("worker_resident_bytes", "Memory of the worker."),
}
_KEY_GAUGES = {
    "revision": "Revision in force or to be, 0: the base draft.",
    "good_revision": "The one to return to.",
    "is_frozen": "1 if it learns no more.",
    "num_synthetic_records": "Records of answers that the idle engine has written to be learned from.",
    "num_trained_positions": "Positions trained on.",
    "num_updates": "Steps of the optimiser.",
    "num_published": "Revisions published.",
    "num_refused": "Revisions that their scores kept from being published.",
    "num_rolled_back": "Revisions taken back.",
    "gate_rate": "Share of its records that teach.",
    "loss": "Of the last update, on positions before they are learned from.",
    "agreement": "Right tokens a verification on held-out positions, of the weights scored last.",
    "is_growing": "1 if it is a whole draft that does not pay yet: nothing is drafted with it.",
    "update_seconds": "Processor time of an update.",
    "acceptance": "Of first draft tokens with the revision in force.",
    "control_acceptance": "The same of requests that keep the base draft.",
    "previous_acceptance": "The same with the revision before.",
}
_GONE_AFTER = 10.0


class AlignmentMetrics:
    """All series of alignment. Those of the worker are as of its last report, and leave with it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        families = MetricFamilies(registry, "alignment_")
        gauge = families.gauge
        counters = {name: families.counter(name, about) for name, about in _COUNTERS.items()}
        self.counters, self._steps = EngineCounters(counters), counters["steps"]
        self._channel_version = gauge("channel_version", "Of the weight channel: grows with each publication.")
        self._draft_version = gauge("draft_version", "Of the adapters that the engine drafts with.", "key")
        self._enabled = gauge("enabled", "1 if the engine logs what adapters are trained with, and drafts with them.")
        self._worker_up = gauge("worker_up", "1 if the adapters worker reports.")
        self._worker = {name: gauge(*about) for name, about in _WORKER_GAUGES.items()}
        self._of_key = {name: gauge(f"adapter_{name}", about, "key") for name, about in _KEY_GAUGES.items()}
        self.layout = ""
        """Of the engine's adapters; empty before it has reported."""

    @property
    def is_enabled(self) -> bool:
        """Whether the engine has reported about alignment."""
        return bool(value_of(self._enabled))

    @property
    def num_steps(self) -> int:
        """Verify steps of drafted sequences since the server started."""
        return value_of(self._steps)

    def observe_engine(self, stats: AlignmentStats) -> None:
        self.layout = stats.layout
        self._enabled.set(1)
        self.counters.follow(stats)
        self._channel_version.set(stats.channel_version)
        self._draft_version.clear()
        for key, version in stats.versions.items():
            self._draft_version.labels(key).set(version)

    def observe_worker(self, worker: WorkerStatus | None, adapters: Mapping[str, AdapterStatus], now: float) -> None:
        """Take over what the worker wrote last (None: nothing); ``now``: seconds since the epoch."""
        is_up = worker is not None and now - worker.updated_at < _GONE_AFTER
        self._worker_up.set(is_up)
        for name, gauge in self._worker.items():
            value = getattr(worker, name) if is_up else None
            gauge.set(math.nan if value is None else value)  # not its last value as if it were there
        for name, gauge in self._of_key.items():
            gauge.clear()
            for key, status in adapters.items() if is_up else ():
                if (value := getattr(status, name)) is not None:
                    gauge.labels(key).set(value)
