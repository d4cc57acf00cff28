"""The dashboard "Acceptance": how many draft tokens the model accepts, by tenant, domain and position."""

from __future__ import annotations

from deploy.grafana.build import Panel, dashboard, stat, timeseries

_DRAFTS = "evospec:spec_decode_num_drafts_total"
_DRAFTED = "evospec:spec_decode_num_draft_tokens_total"
_ACCEPTED = "evospec:spec_decode_num_accepted_tokens_total"
_COPIED = "evospec:spec_decode_num_copied_tokens_total"
_ACCEPTED_COPIED = "evospec:spec_decode_num_accepted_copied_tokens_total"
_DRAFTED_AT = "evospec:spec_decode_num_draft_tokens_per_pos_total"
_ACCEPTED_AT = "evospec:spec_decode_num_accepted_tokens_per_pos_total"
_BY = '{model=~"$model", tenant=~"$tenant", domain=~"$domain"}'


def _rate(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{_BY}[$__rate_interval]))"


def _length(by: str = "") -> str:
    """Tokens a verification step, the target's own included; nothing where nothing was drafted."""
    return f"1 + {_rate(_ACCEPTED, by)} / ({_rate(_DRAFTS, by)} > 0)"


def _share(of: str, among: str, by: str = "") -> str:
    return f"{_rate(of, by)} / ({_rate(among, by)} > 0)"


def _share_of_own() -> str:
    """Accepted among what the draft itself proposed."""
    accepted = f"{_rate(_ACCEPTED)} - {_rate(_ACCEPTED_COPIED)}"
    return f"({accepted}) / ({_rate(_DRAFTED)} - {_rate(_COPIED)} > 0)"


_STEP_PART = 'sum(rate(evospec:engine_step_seconds_sum{part="%s"}[$__rate_interval]))'

_NOW: list[Panel] = [
    stat("Acceptance length", "none", _length(), about="Tokens a verification step, the target's own included."),
    stat("Draft tokens accepted", "percentunit", _share(_ACCEPTED, _DRAFTED), about="Accepted over drafted tokens."),
    stat("Draft length", "none", _share(_DRAFTED, _DRAFTS), about="Tokens drafted a step and sequence; it adapts."),
    stat("Drafted tokens/s", "short", _rate(_DRAFTED), about="0: speculation is off, or does not pay at this load."),
    stat("Draft", "none", "evospec:engine_info", about="What proposes tokens.", legend="{{draft}}", by_name=True),
    stat("Draft memory", "bytes", "sum(evospec:draft_bytes)", about="Weights and KV cache of the draft."),
]

_LENGTHS: list[Panel] = [
    timeseries("Acceptance length by tenant", "none", (_length("tenant"), "{{tenant}}"),
               about="A tenant near 1 pays for drafts that nobody accepts."),
    timeseries("Acceptance length by domain", "none", (_length("domain"), "domain {{domain}}"),
               about="Sessions of one subject; without a name: requests outside sessions."),
    timeseries("Acceptance length against its own week", "none",
               (f"model_tenant_domain:evospec_acceptance_length:rate5m{_BY}", "{{tenant}} {{domain}} now"),
               (f"model_tenant_domain:evospec_acceptance_length:rate7d{_BY}", "{{tenant}} {{domain}} week"),
               about="What the alert EvoSpecAcceptanceDrop compares (recording rules)."),
]  # fmt: skip

_POSITIONS: list[Panel] = [
    timeseries("Acceptance by position", "percentunit", (_share(_ACCEPTED_AT, _DRAFTED_AT, "position"), "{{position}}"),
               about="Share of the drafts that reached a position whose token there was accepted.", most=1),
    timeseries("Acceptance by position and tenant", "percentunit",
               (_share(_ACCEPTED_AT, _DRAFTED_AT, "tenant, position"), "{{tenant}} {{position}}"),
               about="The same for each tenant.", most=1),
    timeseries("Acceptance by position and domain", "percentunit",
               (_share(_ACCEPTED_AT, _DRAFTED_AT, "domain, position"), "{{domain}} {{position}}"),
               about="The same for each domain.", most=1),
]  # fmt: skip

_WORK: list[Panel] = [
    timeseries("Drafted and accepted tokens/s", "short", (_rate(_DRAFTED), "drafted"), (_rate(_ACCEPTED), "accepted"),
               about="The gap is work of the verification that was for nothing."),
    timeseries("Copies and the draft's own", "percentunit",
               (_share_of_own(), "of the draft's own, accepted"),
               (_share(_COPIED, _DRAFTED), "copied, of all"),
               about="Where a text repeats itself, copies take the draft's place: they are counted above too.", most=1),
    timeseries("Draft length by tenant", "none", (_share(_DRAFTED, _DRAFTS, "tenant"), "{{tenant}}"),
               about="Tokens drafted a step and sequence, as the controller chose."),
    timeseries("Cost of drafting", "percentunit",
               (f"{_STEP_PART % 'draft'} / {_STEP_PART % 'total'}", "draft, share of a step"),
               (f"{_STEP_PART % 'sample'} / {_STEP_PART % 'total'}", "sample, share of a step"),
               about="Time to propose, and to sample and accept, over the whole step.", most=1),
]  # fmt: skip

DASHBOARD = dashboard(
    "evospec-acceptance",
    "EvoSpec: acceptance by tenant, domain and position",
    "What speculative decoding yields, and for whom.",
    ["model", "tenant", "domain"],
    {"Now": _NOW, "By tenant and domain": _LENGTHS, "By position": _POSITIONS, "Work": _WORK},
)
