"""How metrics are made, and how counters are followed that another process keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from evospec.engine.messages import AlignmentStats, EngineStats


class MetricFamilies:
    """Makes metrics of one registry. Names begin with ``evospec:`` and ``prefix``, labels with ``labels``."""

    def __init__(self, registry: CollectorRegistry, prefix: str = "", labels: Sequence[str] = ()) -> None:
        self._registry, self._prefix, self._labels = registry, f"evospec:{prefix}", labels

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, about, (*self._labels, *labels), registry=self._registry)

    def gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(self._prefix + name, about, (*self._labels, *labels), registry=self._registry)

    def histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        labels = *self._labels, *labels
        return Histogram(self._prefix + name, about, labels, buckets=buckets, registry=self._registry)


def value_of(metric: Counter | Gauge) -> int:
    """What a metric without labels, or with all of them given, counts now."""
    return int(next(iter(metric.collect())).samples[0].value)


class EngineCounters:
    """Counters that the engine keeps from its start; ``counters`` shows each by its field in the engine's report."""

    def __init__(self, counters: Mapping[str, Counter]) -> None:
        self._counters = counters
        self._last: dict[str, float] = {}

    def restart(self) -> None:
        """The engine's counters begin at 0 again."""
        self._last.clear()

    def follow(self, stats: EngineStats | AlignmentStats) -> None:
        """Add what has come since the last report."""
        for name, counter in self._counters.items():
            value = getattr(stats, name)
            counter.inc(max(0, value - self._last.get(name, 0)))
            self._last[name] = value
