"""The dashboard "Vocabulary": what draft vocabularies hold, where it came from, what it yields, and what is kept."""

from __future__ import annotations

from deploy.grafana.build import Panel, Query, dashboard, stat, timeseries

_BY = '{model=~"$model", tenant=~"$tenant", domain=~"$domain"}'
_VERIFIED = "evospec:vocab_verified_tokens_total"
_COVERED = "evospec:vocab_covered_tokens_total"
_EVENTS = "evospec:vocab_events_total"
_INSERTIONS = "evospec:vocab_insertions_total"
_HITS = "evospec:vocab_hits_total"
_TAIL = "evospec:vocab_tail_tokens"
_DROPPED = "evospec:session_snapshots_dropped_total"
_REFUSED = "evospec:vocab_snapshots_refused_total"
_SESSION = "evospec:session_seconds"
_STEPS = "evospec:vocab_step_seconds"


def _rate(metric: str, by: str = "", where: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    selector = _BY.replace("}", f", {where}}}") if where else _BY
    return f"sum{grouping} (rate({metric}{selector}[$__rate_interval]))"


def _share(of: str, among: str, by: str = "") -> str:
    """Nothing where nothing was counted."""
    return f"{_rate(of, by)} / ({_rate(among, by)} > 0)"


def _missed(by: str = "") -> str:
    return f"1 - {_share(_COVERED, _VERIFIED, by)}"


def _tail(by: str = "") -> str:
    return _share(f"{_TAIL}_sum", f"{_TAIL}_count", by)


def _quantiles(buckets: str, of: str = "") -> list[Query]:
    return [
        (f"histogram_quantile({share}, {buckets})", f"{of} p{share * 100:.0f}".strip()) for share in (0.5, 0.9, 0.99)
    ]


def _session_quantiles(operation: str) -> list[Query]:
    return _quantiles(_rate(f"{_SESSION}_bucket", "le", f'operation="{operation}"'))


def _session_mean(operation: str) -> Query:
    where = f'operation="{operation}"'
    seconds, count = (_rate(f"{_SESSION}_{part}", "tenant, domain", where) for part in ("sum", "count"))
    return f"{seconds} / ({count} > 0)", f"{operation} {{{{tenant}}}} {{{{domain}}}}"


def _outcomes(operation: str) -> Query:
    return _rate("evospec:session_operations_total", "outcome", f'operation="{operation}"'), "{{outcome}}"


_NOW: list[Panel] = [
    stat("Coverage", "percentunit", _share(_COVERED, _VERIFIED),
         about="Share of the verified tokens that the draft could have proposed."),
    stat("Out of vocabulary", "percentunit", _missed(), about="The rest: each ends a draft, however good it is."),
    stat("Tail", "short", _tail(), about="Mean tokens of a sequence's own in its vocabulary, at its end."),
    stat("Accepted from tails", "percentunit",
         f"{_rate(_HITS)} / ({_rate('evospec:spec_decode_num_accepted_tokens_total')} > 0)",
         about="Share of the accepted draft tokens that are not in the core: what the tails are for."),
    stat("Vocabularies in use", "percentunit",
         "sum(evospec:vocabularies_used) / (sum(evospec:vocabularies_total) > 0)",
         about="At 100 % further sequences draft from the core alone (speculation.dynamic.max_sessions)."),
    stat("Snapshots dropped in a day", "short", f"sum(increase({_DROPPED}{_BY}[1d])) or vector(0)",
         about="Sessions that start anew, because what Redis had of them was damaged or too large."),
]  # fmt: skip

_COVERAGE: list[Panel] = [
    timeseries("Coverage by tenant", "percentunit", (_share(_COVERED, _VERIFIED, "tenant"), "{{tenant}}"),
               about="Share of the verified tokens in the sequence's vocabulary; counted at its end.", most=1),
    timeseries("Coverage by domain", "percentunit", (_share(_COVERED, _VERIFIED, "domain"), "domain {{domain}}"),
               about="Sessions of one subject; without a name: requests outside sessions.", most=1),
    timeseries("Coverage against its own week", "percentunit",
               (f"model_tenant_domain:evospec_vocab_coverage:rate5m{_BY}", "{{tenant}} {{domain}} now"),
               (f"model_tenant_domain:evospec_vocab_coverage:rate7d{_BY}", "{{tenant}} {{domain}} week"),
               about="What the alert EvoSpecCoverageDrop compares (recording rules).", most=1),
    timeseries("Out-of-vocabulary rate by tenant", "percentunit", (_missed("tenant"), "{{tenant}}"),
               about="1 - coverage, on an axis of its own."),
    timeseries("Out-of-vocabulary rate by domain", "percentunit", (_missed("domain"), "domain {{domain}}"),
               about="A new subject shows as a rise that falls while the tails follow."),
    timeseries("Events/s by tenant and domain", "short", (_rate(_EVENTS, "tenant, domain"), "{{tenant}} {{domain}}"),
               about="Verified steps with a token that could not be drafted: each has neighbours looked up."),
]  # fmt: skip

_TAILS: list[Panel] = [
    timeseries("Tail by tenant", "short", (_tail("tenant"), "{{tenant}}"),
               about="Mean tokens of a sequence's own in its vocabulary, at its end."),
    timeseries("Tail by domain", "short", (_tail("domain"), "domain {{domain}}"), about="The same for each domain."),
    timeseries("Tail, distribution", "short", *_quantiles(_rate(f"{_TAIL}_bucket", "le")),
               about="At the S of vocabulary dynamic:K+S tails are full, and tokens replace each other."),
    timeseries("Insertions/s by source", "short", (_rate(_INSERTIONS, "source"), "{{source}}"), stacked=True,
               about="Tokens put into tails: from the session's or tenant's past, the text, the target's top-k."),
    timeseries("Hits/s by source", "short", (_rate(_HITS, "source"), "{{source}}"), stacked=True,
               about="Accepted draft tokens from tails, by the source that had put them there."),
    timeseries("Hits an insertion", "none", (_share(_HITS, _INSERTIONS, "source"), "{{source}}"),
               about="What a source's insertions are worth."),
    timeseries("Insertions/s by tenant and domain", "short",
               (_rate(_INSERTIONS, "tenant, domain"), "{{tenant}} {{domain}}"), about="All sources."),
    timeseries("Hits/s by tenant and domain", "short", (_rate(_HITS, "tenant, domain"), "{{tenant}} {{domain}}"),
               about="All sources."),
    timeseries("Accepted from tails by tenant", "percentunit",
               (_share(_HITS, "evospec:spec_decode_num_accepted_tokens_total", "tenant"), "{{tenant}}"),
               about="Share of the tenant's accepted draft tokens that are not in the core."),
]  # fmt: skip

_TIME: list[Panel] = [
    timeseries("Retrieval time of a step", "s",
               *_quantiles(f"sum by (le) (rate({_STEPS}_bucket[$__rate_interval]))"),
               about="Until all vocabularies of a batch have followed what was verified, retrieval included."),
    timeseries("Retrieval, share of a step", "percentunit",
               (f"sum(rate({_STEPS}_sum[$__rate_interval])) / "
                '(sum(rate(evospec:engine_step_seconds_sum{part="total"}[$__rate_interval])) > 0)', "vocabularies"),
               about="Part of the share of drafting."),
    timeseries("Semantic index", "none",
               ("sum(rate(evospec:vocab_semantic_queries_total[$__rate_interval]))", "searches/s"),
               ("sum(rate(evospec:vocab_semantic_seconds_total[$__rate_interval]))", "cores busy"),
               about="Searches run beside the step loop. 0: switched off (speculation.dynamic.semantic)."),
]  # fmt: skip

_SNAPSHOTS: list[Panel] = [
    timeseries("Load time", "s", *_session_quantiles("load"),
               about="From admission until the session is there: one round trip to Redis."),
    timeseries("Save time", "s", *_session_quantiles("save"),
               about="Until Redis has what the request ended with; merging with requests that ran at once included."),
    timeseries("Load and save time by tenant and domain", "s", _session_mean("load"), _session_mean("save"),
               about="Means."),
    timeseries("Loads/s by outcome", "reqps", _outcomes("load"), stacked=True,
               about="created: first request, or Redis had lost it; unavailable: Redis down or slow, served without."),
    timeseries("Saves/s by outcome", "reqps", _outcomes("save"), stacked=True,
               about="merged: with requests that ran at once; gone: deleted meanwhile; unavailable: as for loads."),
    timeseries("Dropped snapshots/s", "short",
               (_rate(_DROPPED, "operation, reason, tenant, domain"), "{{operation}} {{reason}} {{tenant}} {{domain}}"),
               (f"sum(rate({_REFUSED}[$__rate_interval]))", "refused by the engine"),
               about="Damaged or too large; the alert EvoSpecSnapshotsDropped tells of each."),
]  # fmt: skip

DASHBOARD = dashboard(
    "evospec-vocabulary",
    "EvoSpec: vocabulary",
    "What draft vocabularies of sessions hold, what that yields, and what is kept between requests.",
    ["model", "tenant", "domain"],
    {"Now": _NOW, "Coverage": _COVERAGE, "Tails": _TAILS, "Time": _TIME, "Snapshots": _SNAPSHOTS},
)
