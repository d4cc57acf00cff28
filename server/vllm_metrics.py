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
_VLLM_NAMES = {"preemptions": "num_preemptions", "engine_step_tokens": "iteration_tokens_total"}
"""Of ours that are called otherwise."""
_LABELS = ("model_name", "engine")
_ENGINE = "0"


class WithVllmNames(Collector):
    """What ``registry`` has, and some of it again; ``model``: the value of ``model_name``."""

    def __init__(self, registry: Collector, model: str) -> None:
        self._registry, self._labels = registry, (model, _ENGINE)

    def collect(self) -> Iterator[Metric]:
        """All families, one at a time: samples that live long are work for the collector of garbage."""
        blocks = {"kv_blocks_used": 0.0, "kv_blocks_total": 0.0}
        for family in self._registry.collect():
            yield family
            own_name = family.name.removeprefix("evospec:")
            name = _VLLM_NAMES.get(own_name, own_name)
            if name in _COUNTERS:
                yield self._counter(name, family)
            elif name in _GAUGES:
                yield self._gauge(name, family.documentation, _sum(family, ""))
            elif name in _HISTOGRAMS:
                yield self._histogram(name, family)
            elif name in blocks:
                blocks[name] = _sum(family, "")
        used, total = blocks.values()
        yield self._gauge("kv_cache_usage_perc", "Used KV cache blocks, from 0 to 1.", used / total if total else 0.0)

    def _counter(self, name: str, own: Metric) -> Metric:
        labels = _COUNTERS[name]
        counter = CounterMetricFamily(f"vllm:{name}", own.documentation, labels=(*_LABELS, *labels))
        for values, value in (_sums(own, "_total", labels) or ({} if labels else {(): 0.0})).items():
            counter.add_metric((*self._labels, *values), value)
        return counter

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        gauge.add_metric(self._labels, value)
        return gauge

    def _histogram(self, name: str, own: Metric) -> Metric:
        histogram = HistogramMetricFamily(f"vllm:{name}", own.documentation, labels=_LABELS)
        buckets = [(bound, count) for (bound,), count in _sums(own, "_bucket", ("le",)).items()]
        if buckets:
            histogram.add_metric(self._labels, buckets, _sum(own, "_sum"))
        return histogram


def _sums(metric: Metric, suffix: str, labels: Sequence[str]) -> dict[tuple[str, ...], float]:
    """The samples with a suffix, summed over all labels but ``labels``, by the values of these."""
    sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for sample in metric.samples:
        if sample.name == metric.name + suffix:
            sums[tuple(sample.labels[label] for label in labels)] += sample.value
    return sums


def _sum(metric: Metric, suffix: str) -> float:
    return sum(_sums(metric, suffix, ()).values())
