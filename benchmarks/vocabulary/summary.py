"""What the runs of a ``benchmarks.vocabulary`` record come to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.common.drafting import NONE
from benchmarks.common.runs import ALL, Record, acceptance, ratios, runs_of, speeds
from benchmarks.vocabulary.modes import FR_SPEC, FULL, HARD_SWITCH, NANOSPEC
from benchmarks.vocabulary.parts import LEARNING

TARGET_DOMAINS = ("code", "law", "medicine")
"""Issue 4 sets its bars on these."""
SMOOTHING = 3
"""Requests whose acceptance is taken together, after a switch of topic."""
SETTLED_SHARE = 0.95


def length(runs: Iterable[Record]) -> float | None:
    """Acceptance length of all together; None without drafts."""
    counts = acceptance(runs)
    return counts.length if counts.num_drafts else None


def share_of(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs, where both are there."""
    return ours / theirs if ours and theirs else None


def round_speeds(record: Record, mode: str, decode_only: bool = False) -> dict[int, float]:
    """Tokens a second by round, of ``TARGET_DOMAINS`` (of all domains where the plan has none of them).

    Args:
        record: of part ``modes`` or ``sources``.
        mode: whose.
        decode_only: leave out steps that computed a prompt.
    """
    plan = record["plan"]
    domains = [domain for domain in plan["domains"] if domain in TARGET_DOMAINS] or plan["domains"]
    runs = [run for run in runs_of(record, plan["model"], mode, ALL) if run["domain"] in domains]
    if decode_only:
        runs = [run | {"tokens": run["decode_tokens"], "seconds": run["decode_seconds"]} for run in runs]
    return speeds([run for run in runs if run["tokens"]], domains)


def references(modes: Sequence[str]) -> list[str]:
    """Modes that others are compared with: none, full, FR-Spec's setting, others' methods."""
    fr_spec = [mode for mode in modes if mode.startswith(FR_SPEC)]
    return [mode for mode in (NONE, FULL, *fr_spec, NANOSPEC, HARD_SWITCH) if mode in modes]


def mode_summary(record: Record, mode: str) -> Record:
    """A mode of part ``modes`` or ``sources``; ratios of speed by round, to each of the references."""
    plan = record["plan"]

    def runs(of: str, domain: str = ALL) -> list[Record]:
        return runs_of(record, plan["model"], of, domain)

    lengths = {domain: length(runs(mode, domain)) for domain in plan["domains"]}
    shares = {domain: share_of(lengths[domain], length(runs(FULL, domain))) for domain in plan["domains"]}
    known = [share for domain in TARGET_DOMAINS if (share := shares.get(domain)) is not None]
    steps = sum(run["decode_steps"] for run in runs(mode))
    speed, decode_speed = (round_speeds(record, mode, decode_only) for decode_only in (False, True))
    others = references(plan["modes"])
    return {
        "mode": mode,
        "lengths": lengths,
        "shares_of_full": shares,
        "share_of_full": fmean(known) if known else None,
        "coverage": coverage(runs(mode)),
        "rounds": len(speed),
        "tokens_per_second": median(speed.values()) if speed else None,
        "to": {other: ratios(speed, round_speeds(record, other)) for other in others},
        "decode_to": {other: ratios(decode_speed, round_speeds(record, other, decode_only=True)) for other in others},
        "retrieval_ms": 1e3 * sum(run["retrieval_seconds"] for run in runs(mode)) / steps if steps else None,
        "noise": max((run["noise"] for run in runs(mode)), default=None),
    }


def coverage(runs: Iterable[Record]) -> float | None:
    """Share of the verified tokens that could have been drafted; None where no vocabulary followed them."""
    counts = [(run["covered"], run["verified"]) for run in runs]
    verified = sum(all_ for _, all_ in counts)
    return sum(covered for covered, _ in counts) / verified if verified else None


def switch_lengths(record: Record, mode: str) -> dict[int, float]:
    """Acceptance length by place in the session, of all sessions together, each with its next ones (``SMOOTHING``).

    Places of different topics are not taken together.
    """
    runs = runs_of(record, record["plan"]["model"], mode, ALL)
    result: dict[int, float] = {}
    for place, domain in sorted({(run["place"], run["domain"]) for run in runs}):
        near = [run for run in runs if run["domain"] == domain and 0 <= run["place"] - place < SMOOTHING]
        if (value := length(near)) is not None:
            result[place] = value
    return result


def settled_after(values: Sequence[float], share: float = SETTLED_SHARE) -> int | None:
    """Requests before the first whose value is ``share`` of the steady state, which is the mean of the later half.

    Args:
        values: by request since the switch.
        share: how near is near enough.
    """
    if not values:
        return None
    steady = fmean(values[len(values) // 2 :])
    return next(place for place, value in enumerate(values) if value >= share * steady)


def switch_summary(record: Record, mode: str) -> list[Record]:
    """By topic; values are shares of the full head's on the same prompts, so that prompts' difficulty cancels."""
    model, found = record["plan"]["model"], []
    ours, full = switch_lengths(record, mode), switch_lengths(record, FULL)
    for domain in dict.fromkeys(run["domain"] for run in record["runs"]):
        runs = runs_of(record, model, mode, domain)
        places = sorted({run["place"] for run in runs} & ours.keys() & full.keys())
        shares = [ours[place] / full[place] for place in places]
        found.append(
            {
                "mode": mode,
                "domain": domain,
                "length": length(runs),
                "first": shares[0] if shares else None,
                "steady": fmean(shares[len(shares) // 2 :]) if shares else None,
                "settled_after": settled_after(shares),
            }
        )
    return found


def tenant_summary(record: Record, mode: str, domains: Collection[str]) -> list[Record]:
    """By kind of tenant: coverage and acceptance of the first tokens, and what supplied accepted tail tokens."""
    model = record["plan"]["model"]
    runs = [run for domain in domains for run in runs_of(record, model, mode, domain)]
    full = [run for domain in domains for run in runs_of(record, model, FULL, domain)]
    found = []
    for kind in dict.fromkeys(run["kind"] for run in runs if run["kind"] != LEARNING):
        ours = [run for run in runs if run["kind"] == kind]
        value = length(ours)
        hits = [run["hits"] for run in ours]
        found.append(
            {
                "mode": mode,
                "kind": kind,
                "requests": len(ours),
                "coverage": coverage(ours),
                "length": value,
                "share_of_full": share_of(value, length([run for run in full if run["kind"] == kind])),
                "hits": {key: sum(h.get(key, 0) for h in hits) for key in sorted({k for h in hits for k in h})},
            }
        )
    return found


def load_summary(record: Record, mode: str, level: int) -> Record:
    """tok/s at one concurrency, and ratios to every other mode within rounds."""
    plan = record["plan"]

    def speed(of: str) -> dict[int, float]:
        runs = runs_of(record, plan["model"], of, ALL, level)
        return speeds(runs, sorted({run["domain"] for run in runs}))

    ours = speed(mode)
    runs = runs_of(record, plan["model"], mode, ALL, level)
    return {
        "mode": mode,
        "concurrency": level,
        "rounds": len(ours),
        "tokens_per_second": median(ours.values()) if ours else None,
        "to": {other: ratios(ours, speed(other)) for other in plan["modes"] if other != mode},
        "length": length(runs),
        "coverage": coverage(runs),
        "noise": max((run["noise"] for run in runs), default=None),
    }


def bytes_summary(record: Record, mode: str) -> Record:
    """A long conversation: snapshots, and what steps and retrieval took (milliseconds)."""
    runs = runs_of(record, record["plan"]["model"], mode, ALL)
    sizes = [size for run in runs for size in run["snapshot_bytes"]]
    half = len(runs) // 2
    return {
        "mode": mode,
        "turns": len(runs),
        "first_bytes": sizes[0] if sizes else None,
        "last_bytes": sizes[-1] if sizes else None,
        "most_bytes": max(sizes, default=None),
        "early_length": length(runs[:half]),
        "late_length": length(runs[half:]),
        "step_ms": shares_at([value for run in runs for value in run["step_ms"]]),
        "retrieval_ms": shares_at([value for run in runs for value in run["retrieval_ms"]]),
    }


def shares_at(values: Sequence[float], shares: Sequence[float] = (0.5, 0.9, 0.99)) -> list[float]:
    """The values below which so much of all lies (nearest rank); empty without values."""
    ranked = sorted(values)
    return [ranked[min(int(share * len(ranked)), len(ranked) - 1)] for share in shares] if ranked else []


def summaries(record: Record) -> list[Any]:
    """Of every mode, as the record's part wants it."""
    plan = record["plan"]
    modes = plan["modes"]
    match plan["part"]:
        case "switch":
            return [row for mode in modes for row in switch_summary(record, mode)]
        case "tenant":
            return [row for mode in modes for row in tenant_summary(record, mode, plan["domains"])]
        case "load":
            return [load_summary(record, mode, level) for level in plan["levels"] for mode in modes]
        case "bytes":
            return [bytes_summary(record, mode) for mode in modes]
        case _:
            return [mode_summary(record, mode) for mode in modes]
