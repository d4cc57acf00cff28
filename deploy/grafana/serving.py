"""The dashboard "Serving": load, latency, the engine's steps, memory, trouble."""

from __future__ import annotations

from deploy.grafana.build import Panel, Query, dashboard, stat, timeseries

_BY = '{model=~"$model", tenant=~"$tenant"}'


def _rate(metric: str, by: str = "tenant") -> str:
    return f"sum by ({by}) (rate({metric}{_BY}[$__rate_interval]))"


def _quantiles(metric: str) -> list[Query]:
    buckets = f"sum by (le) (rate({metric}_bucket{_BY}[$__rate_interval]))"
    return [(f"histogram_quantile({share}, {buckets})", f"p{share * 100:.0f}") for share in (0.5, 0.9, 0.99)]


_PARTS = 'rate(evospec:engine_step_seconds_sum{part!="total"}[$__rate_interval])'
_STEPS = 'rate(evospec:engine_step_seconds_count{part="total"}[$__rate_interval])'

_NOW: list[Panel] = [
    stat("Engine", "none", "min(evospec:engine_up)", about="1 if the engine is ready."),
    stat("Output tokens/s", "short", f"sum({_rate('evospec:generation_tokens_total')})", about="All tenants chosen."),
    stat("Running", "short", "sum(evospec:num_requests_running)", about="Sequences in the batch."),
    stat("Waiting", "short", "sum(evospec:num_requests_waiting)", about="Sequences queued in the engine."),
    stat("KV blocks in use", "percentunit", "sum(evospec:kv_blocks_used) / sum(evospec:kv_blocks_total)",
         about="At 100 % sequences are preempted and computed again."),
    stat("Restarts in a day", "short",
         'sum(increase({__name__=~"evospec:(engine|process)_restarts_total", process!="engine"}[1d]))',
         about="Engine, worker and Valkey processes started again after they died."),
]  # fmt: skip

_LOAD: list[Panel] = [
    timeseries("Requests/s by status", "reqps", (
        'sum by (status) (rate(evospec:requests_total{model=~"$model", tenant=~"$tenant", '
        'endpoint=~"/v1/.*completions"}[$__rate_interval]))', "{{status}}"),
        about="Completion endpoints. 499: the client went away; 429: rate limit; 503: overloaded or no engine."),
    timeseries("Output tokens/s by tenant", "short", (_rate("evospec:generation_tokens_total"), "{{tenant}}"),
               about="Tokens sent to clients.", stacked=True),
    timeseries("Prompt tokens/s by tenant", "short", (_rate("evospec:prompt_tokens_total"), "{{tenant}}"),
               about="Prompt tokens admitted, cached ones included.", stacked=True),
    timeseries("Sequences", "short", ("sum(evospec:num_requests_running)", "running"),
               ("sum(evospec:num_requests_waiting)", "waiting"), about="In the batch, and queued in the engine."),
    timeseries("Waiting by tenant", "short", ("sum by (tenant) (evospec:num_requests_waiting_by_tenant)", "{{tenant}}"),
               ("sum(evospec:num_requests_waiting)", "all"), about="Who queues."),
    timeseries("Refused and lost", "reqps",
               ("sum by (limit) (rate(evospec:rate_limited_total[$__rate_interval]))", "rate limit: {{limit}}"),
               (f"sum(rate(evospec:client_disconnects_total{_BY}[$__rate_interval]))", "client went away"),
               ("sum(rate(evospec:nonfinite_sequences_total[$__rate_interval]))", "logits not finite"),
               ("sum(rate(evospec:redis_errors_total[$__rate_interval]))", "Redis errors"),
               about="Requests over a rate limit, clients that went away, damaged weights, errors of Redis."),
]  # fmt: skip

_LATENCY: list[Panel] = [
    timeseries("Time to first token", "s", *_quantiles("evospec:time_to_first_token_seconds"),
               about="From the tokenised request to the first token of a sequence, queue included."),
    timeseries("Inter-token latency", "s", *_quantiles("evospec:inter_token_latency_seconds"),
               about="Seconds a token between two outputs of a sequence."),
    timeseries("Request latency", "s", *_quantiles("evospec:e2e_request_latency_seconds"),
               about="From the tokenised request to its last token."),
]  # fmt: skip

_ENGINE: list[Panel] = [
    timeseries("Time of a step by part", "s", (f"sum by (part) ({_PARTS}) / ignoring (part) group_left sum({_STEPS})",
               "{{part}}"), stacked=True,
               about="Mean: draft (proposing), verify (the model's pass), sample, overhead (scheduling, commit)."),
    timeseries("Share of a step by part", "percentunit",
               (f"sum by (part) ({_PARTS}) / ignoring (part) group_left sum({_PARTS})", "{{part}}"),
               about="The same as shares.", stacked=True, most=1),
    timeseries("Tokens a step", "short", (
        "sum(rate(evospec:engine_step_tokens_sum[$__rate_interval])) / "
        "sum(rate(evospec:engine_step_tokens_count[$__rate_interval]))", "computed"),
        about="Mean tokens computed in a step: prefill, decode and drafts."),
    timeseries("KV blocks", "short", ("sum(evospec:kv_blocks_used)", "in use"),
               ("sum(evospec:kv_blocks_total)", "all"), about="Blocks of the paged cache, with cached prefixes."),
    timeseries("Prefix cache hit rate", "percentunit", (
        "sum(rate(evospec:prefix_cache_hits_total[$__rate_interval])) / "
        "sum(rate(evospec:prefix_cache_queries_total[$__rate_interval]))", "hits"),
        about="Share of prompt tokens found in the cache.", most=1),
    timeseries("Preemptions/s", "short", ("sum(rate(evospec:preemptions_total[$__rate_interval]))", "preemptions"),
               about="Sequences thrown out for lack of blocks, to be computed again."),
]  # fmt: skip

_HEALTH: list[Panel] = [
    timeseries("Memory", "bytes", ("evospec:kv_cache_bytes", "KV cache"), ("evospec:draft_bytes", "draft and its KV"),
               ("process_resident_memory_bytes{job=\"evospec\"}", "API server"),
               about="Reserved by the engine, and resident in the API server."),
    timeseries("Restarts and hangs", "short",
               ("sum(increase(evospec:engine_restarts_total[$__rate_interval]))", "engine new"),
               ('sum by (process) (increase(evospec:process_restarts_total{process!="engine"}[$__rate_interval]))',
                "{{process}} new"),
               ("sum by (process) (increase(evospec:process_hangs_total[$__rate_interval]))", "{{process}} hung"),
               about="Processes started again, and those killed because they gave no sign of life."),
    timeseries("CPU of the API server", "percentunit",
               ("rate(process_cpu_seconds_total{job=\"evospec\"}[$__rate_interval])", "API server"),
               about="Cores; one is the most a single API server can use."),
]  # fmt: skip

DASHBOARD = dashboard(
    "evospec-serving",
    "EvoSpec: serving",
    "Load, latency, engine and memory of one or several EvoSpec servers.",
    ["model", "tenant"],
    {"Now": _NOW, "Load": _LOAD, "Latency": _LATENCY, "Engine": _ENGINE, "Processes": _HEALTH},
)
