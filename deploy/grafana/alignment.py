"""The dashboard "Alignment": what the draft learns while it serves, whether it helps, and what the worker is doing."""

from __future__ import annotations

from deploy.grafana.build import Panel, Query, dashboard, stat, timeseries

_BY = '{key=~"$key"}'
_ENGINE, _WORKER, _ADAPTER = (f"evospec:alignment_{part}" for part in ("", "worker_", "adapter_"))


def _of_key(name: str, legend: str = "") -> Query:
    """What the worker reports of each key."""
    return f"max by (key) ({_ADAPTER}{name}{_BY})", f"{legend} {{{{key}}}}".strip()


def _pace_of_key(name: str) -> Query:
    """A second, of what the worker counts for each key."""
    return f"sum by (key) (rate({_ADAPTER}{name}{_BY}[$__rate_interval]))", "{{key}}"


def _rate(name: str) -> str:
    return f"sum(rate({_ENGINE}{name}[$__rate_interval]))"


_GAIN = f"{_ADAPTER}acceptance{_BY} - {_ADAPTER}control_acceptance{_BY}"

_NOW: list[Panel] = [
    stat("Worker", "none", f"min({_WORKER}up)", about="1: it reports. The alert EvoSpecWorkerDown tells when not."),
    stat("Keys with an adapter", "none", f"count({_ENGINE}draft_version{_BY}) or vector(0)",
         about="Keys whose requests draft with something that was learned; the others have the base draft."),
    stat("Gain over the base draft", "percentunit", f"avg({_GAIN})",
         about="Acceptance of first draft tokens minus that of control requests, mean over keys."),
    stat("Taken back in a day", "none", f"sum(increase({_ADAPTER}num_rolled_back{_BY}[1d])) or vector(0)",
         about="Versions that served worse than the base draft or the version before, now in quarantine."),
    stat("Records not yet read", "short", f"sum({_WORKER}lag_records)",
         about="Of the token log. Beyond log.max_records the oldest are lost."),
    stat("Worker memory", "bytes", f"sum({_WORKER}resident_bytes)", about="Resident, model parts included."),
]  # fmt: skip

_ACCEPTANCE: list[Panel] = [
    timeseries("Acceptance beside control by key", "percentunit",
               _of_key("acceptance", "adapter"), _of_key("control_acceptance", "base"),
               about="Of first draft tokens since the version came; control requests keep the base draft.", most=1),
    timeseries("Acceptance before and after by key", "percentunit",
               _of_key("previous_acceptance", "before"), _of_key("acceptance", "after"),
               about="Of the version before (or the base draft) until this one came, and of this one.", most=1),
    timeseries("Gain over the base draft by key", "percentunit", (f"max by (key) ({_GAIN})", "{{key}}"),
               about="Below zero for long: the version is taken back.", signed=True),
]  # fmt: skip

_VERSIONS: list[Panel] = [
    timeseries("Versions by key", "none", (f"max by (key) ({_ENGINE}draft_version{_BY})", "{{key}}"),
               about="Of the weight channel, as the engine drafts with them; all keys count together."),
    timeseries("Revisions by key", "none", _of_key("revision", "in force"), _of_key("good_revision", "good"),
               about="Of each key. 0: the base draft; good: the one to return to."),
    timeseries("Published by key", "none", _of_key("num_published"), about="Versions that passed their scoring."),
    timeseries("Refused by key", "none", _of_key("num_refused"),
               about="Versions that were worse on held-out positions, and never served."),
    timeseries("Taken back by key", "none", _of_key("num_rolled_back"),
               about="By the guard or an operator; the alert EvoSpecAdapterTakenBack tells of each."),
    timeseries("Taken over by the engine/s", "none", (_rate("loads_total"), "loads"),
               (_rate("failed_loads_total"), "damaged, or changed too fast to be read"),
               about="Copied in place between two steps."),
]  # fmt: skip

_LEARNING: list[Panel] = [
    timeseries("Updates/s by key", "none", _pace_of_key("num_updates"),
               about="Steps of the optimiser. None where nothing more is to be gained, or the machine is wanted."),
    timeseries("Positions trained/s by key", "none", _pace_of_key("num_trained_positions"), about="In these updates."),
    timeseries("Loss by key", "none", _of_key("loss"), about="Of the last update, before it was learned from."),
    timeseries("Update time by key", "s", _of_key("update_seconds"), about="Forward, backward and optimiser."),
    timeseries("Gate rate by key", "percentunit", _of_key("gate_rate"), most=1,
               about="Share of a key's records that teach: a draft was refused, or the target thought little of it."),
    timeseries("Worker state", "none", (f"min({_WORKER}up)", "up"), (f"max({_WORKER}paused)", "waits for the machine"),
               about="1: yes. It waits while fewer than pace.spare_cores cores are idle.", most=1),
]  # fmt: skip

_LOG: list[Panel] = [
    timeseries("Logged records/s", "short", (_rate("records_hard_total"), "hard examples"),
               (_rate("records_sampled_total"), "unbiased sample and control"), stacked=True,
               about="Verify steps that the engine logs; the guard counts the sample only."),
    timeseries("Share of steps logged", "percentunit",
               (f"({_rate('records_hard_total')} + {_rate('records_sampled_total')}) / ({_rate('steps_total')} > 0)",
                "logged"), about="Of the verify steps of drafted sequences.", most=1),
    timeseries("Dropped records/s", "short", (_rate("records_dropped_by_queue_total"), "queue full"),
               (_rate("records_dropped_by_redis_total"), "Redis failed"), about="The engine never waits for the log."),
    timeseries("Log lag", "short", (f"sum({_WORKER}lag_records)", "records not yet read"), about="In the stream."),
    timeseries("Records lost to the worker/s", "short",
               *((f"sum(rate({_WORKER}num_{name}[$__rate_interval]))", about) for name, about in
                 (("lapsed", "lapsed: features overwritten"), ("trimmed", "trimmed from the stream"),
                  ("without_slot", "no slot for their key"), ("unusable", "unusable"))),
               about="Lapsed: raise log.ring_rows; trimmed: raise log.max_records; no slot: raise num_slots."),
    timeseries("Worker memory", "bytes", (f"sum({_WORKER}resident_bytes)", "resident"),
               about="Model parts, replay of each key, optimiser."),
]  # fmt: skip

DASHBOARD = dashboard(
    "evospec-alignment",
    "EvoSpec: alignment",
    "What the draft learns from live traffic, whether it helps, and what became of the token log.",
    ["key"],
    {"Now": _NOW, "Acceptance": _ACCEPTANCE, "Versions": _VERSIONS, "Learning": _LEARNING, "Log and worker": _LOG},
    variables_of=f"{_ADAPTER}revision",
)
