"""What the runs of a ``benchmarks.speculation`` record come to: medians of ratios, sums of counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import median

from benchmarks.common.drafting import NONE
from benchmarks.common.in_process import PARTS
from benchmarks.common.runs import ALL, Record, acceptance, ratios, runs_of, speeds


def shares(runs: Iterable[Record]) -> dict[str, float]:
    """Each part's share of the time of all steps."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for run in runs:
        for part in PARTS:
            seconds[part] += run["step_seconds"][part]
    whole = sum(seconds.values())
    return {part: value / whole if whole else 0.0 for part, value in seconds.items()}


def summary(record: Record, model: str, mode: str, domain: str, level: int) -> Record | None:
    """What a cell's runs come to; None where no round has both them and none's."""
    runs = runs_of(record, model, mode, domain, level)
    domains = record["plan"]["domains"] if domain == ALL else [domain]
    ours, none = speeds(runs, domains), speeds(runs_of(record, model, NONE, domain, level), domains)
    to_none = ratios(ours, none)
    if not to_none:
        return None
    counts = acceptance(runs)
    steps = sum(run["tokens"] for run in runs) - sum(counts.accepted)  # of sequences; each gave one token of its own
    return {
        "model": model,
        "mode": mode,
        "domain": domain,
        "concurrency": level,
        "rounds": len(ours),
        "tokens_per_second": median(ours.values()),
        "ratio": median(to_none),
        "ratios": to_none,
        "decode_ratio": _decode_ratio(runs, runs_of(record, model, NONE, domain, level)),
        "acceptance_length": counts.length if counts.num_drafts else None,
        "acceptance_rates": counts.rates,
        "drafts_a_step": sum(counts.drafted) / steps,
        "shares": shares(runs),
        "noise": max(run["noise"] for run in runs),
    }


def _decode_ratio(ours: Iterable[Record], theirs: Iterable[Record]) -> float | None:
    """The median, over rounds and domains, of the ratio of the speeds in steps without a prompt."""
    speed_of = [
        {(run["round"], run["domain"]): run["decode_tokens_per_second"] for run in runs} for runs in (ours, theirs)
    ]
    both = [(speed_of[0][key], speed_of[1][key]) for key in speed_of[0].keys() & speed_of[1].keys()]
    values = [a / b for a, b in both if a is not None and b is not None]
    return median(values) if values else None


def summaries(record: Record) -> list[Record]:
    """Of every cell, and of all domains together."""
    plan = record["plan"]
    found = [
        summary(record, model, mode, domain, level)
        for model in plan["models"]
        for level in plan["levels"]
        for mode in plan["modes"]
        for domain in [*plan["domains"], ALL]
    ]
    return [cell for cell in found if cell is not None]


def worst(record: Record, domains: Collection[str]) -> Record | None:
    """The cell of these domains in which a mode that drafts fares worst against none."""
    cells = [cell for cell in summaries(record) if cell["mode"] != NONE and cell["domain"] in domains]
    return min(cells, key=lambda cell: float(cell["ratio"]), default=None)
