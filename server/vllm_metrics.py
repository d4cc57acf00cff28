"""The metrics once more under vLLM's names and labels, for its dashboards, load generator and routers.

They are made of ours when somebody asks: the tenants together, labelled ``model_name`` and ``engine``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "prompt_tokens": (),
    "generation_tokens": (),
    "request_success": ("finished_reason",),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "num_preemptions": (),
    "spec_decode_num_drafts": (),
    "spec_decode_num_draft_tokens": (),
    "spec_decode_num_accepted_tokens": (),
    "spec_decode_num_accepted_tokens_per_pos": ("position",),
}
"""vLLM's names, with the labels that stay."""
_GAUGES = ("num_requests_running", "num_requests_waiting")
_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "iteration_tokens_total",
)
_OUR_NAMES = {"num_preemptions": "preemptions", "iteration_tokens_total": "engine_step_tokens"}
"""Where they are others than vLLM's."""
_USED = {
    *(_OUR_NAMES.get(name, name) for name in (*_COUNTERS, *_GAUGES, *_HISTOGRAMS)),
    "kv_blocks_used",
    "kv_blocks_total",
}
_OF_TENANTS = {"model", "tenant", "domain"}
_LABELS = ("model_name", "engine")
_ENGINE = "0"

Sums = dict[tuple[str, ...], float]
"""By the values of some labels."""


class WithVllmNames(Collector):
    """What ``registry`` has, and some of it again; ``model``: the value of ``model_name``."""

    def __init__(self, registry: Collector, model: str) -> None:
        self._registry, self._model = registry, model

    def collect(self) -> Iterator[Metric]:
        """All families, one at a time: samples that live long are work for the collector of garbage."""
        summed: dict[str, Metric] = {}
        for family in self._registry.collect():
            yield family
            if (name := family.name.removeprefix("evospec:")) in _USED:
                summed[name] = _all_tenants(family)
        yield from self._renamed(summed)

    def _renamed(self, named: Mapping[str, Metric]) -> Iterator[Metric]:
        for name, labels in _COUNTERS.items():
            own = named[_OUR_NAMES.get(name, name)]
            counter = CounterMetricFamily(f"vllm:{name}", own.documentation, labels=(*_LABELS, *labels))
            for values, value in (_sums(own, "_total", labels) or ({} if labels else {(): 0.0})).items():
                counter.add_metric((self._model, _ENGINE, *values), value)
            yield counter
        for name in _GAUGES:
            yield self._gauge(name, named[name].documentation, _sum(named[name], ""))
        used, total = (_sum(named[f"kv_blocks_{which}"], "") for which in ("used", "total"))
        yield self._gauge("kv_cache_usage_perc", "Used KV cache blocks, from 0 to 1.", used / total if total else 0.0)
        for name in _HISTOGRAMS:
            own = named[_OUR_NAMES.get(name, name)]
            histogram = HistogramMetricFamily(f"vllm:{name}", own.documentation, labels=_LABELS)
            buckets = [(bound, count) for (bound,), count in _sums(own, "_bucket", ("le",)).items()]
            if buckets:
                histogram.add_metric((self._model, _ENGINE), buckets, _sum(own, "_sum"))
            yield histogram

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        gauge.add_metric((self._model, _ENGINE), value)
        return gauge


def _all_tenants(family: Metric) -> Metric:
    """The family with its samples summed over models, tenants and domains."""
    sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name not in _OF_TENANTS)
        sums[sample.name, labels] += sample.value
    summed = Metric(family.name, family.documentation, family.type)
    for (name, labels), value in sums.items():
        summed.add_sample(name, dict(labels), value)
    return summed


def _sums(metric: Metric, suffix: str, labels: Sequence[str]) -> Sums:
    """The samples with a suffix, summed over all labels but some."""
    sums: Sums = defaultdict(float)
    for sample in metric.samples:
        if sample.name == metric.name + suffix:
            sums[tuple(sample.labels[label] for label in labels)] += sample.value
    return sums


def _sum(metric: Metric, suffix: str) -> float:
    return sum(_sums(metric, suffix, ()).values())
