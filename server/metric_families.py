"""How metrics are made, and how counters are followed that another process keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine.messages import AlignmentStats, EngineStats


class MetricFamilies:
    """Makes metrics ``evospec:NAME`` in one ``registry``; ``labels`` are the names of a metric's labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        """A number that only grows."""
        return Counter(f"evospec:{name}", about, labels, registry=self._registry)

    def gauge(self, name: str, about: str, *labels: str) -> Gauge:
        """A number as it is now."""
        return Gauge(f"evospec:{name}", about, labels, registry=self._registry)

    def histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """A distribution; ``buckets`` are upper bounds."""
        return Histogram(f"evospec:{name}", about, labels, buckets=buckets, registry=self._registry)


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
