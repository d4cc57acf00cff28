"""What a ``benchmarks.adapt`` record comes to. Pure: from answers, states and runs to rows of a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.adapt.record import HELD_OUT, RETURN, STREAM
from benchmarks.common.jackknife import jackknife_error

Row = dict[str, Any]
_MEANS = (
    "length", "to_base", "tokens_per_second", "speed_to_base", "decode_to_base", "first_seconds", "step_seconds"
)  # fmt: skip
SMOOTHING = 12
"""Answers of a stream whose acceptance is taken together."""


def length(answers: Iterable[Row]) -> float | None:
    """Acceptance length of all together, bonus included; None without drafts."""
    steps, accepted = 0, 0
    for answer in answers:
        steps, accepted = steps + answer["steps"], accepted + answer["accepted"]
    return 1 + accepted / steps if steps else None


def speed(answers: Sequence[Row]) -> float | None:
    """Tokens a second, one request after another, prompts included."""
    seconds = sum(answer["seconds"] for answer in answers)
    return sum(answer["tokens"] for answer in answers) / seconds if seconds else None


def decode_speed(answers: Sequence[Row]) -> float | None:
    """The same without prompts: tokens after the first, over the time after it; None where that is not known."""
    known = [answer for answer in answers if "first" in answer]
    seconds = sum(answer["seconds"] - answer["first"] for answer in known)
    return sum(answer["tokens"] - 1 for answer in known) / seconds if seconds else None


def first_seconds(answers: Sequence[Row]) -> float | None:
    """Mean time to the first token; None in a record of before it was kept."""
    known = [answer["first"] for answer in answers if "first" in answer]
    return fmean(known) if known else None


def step_seconds(answers: Sequence[Row]) -> float | None:
    """Of a verify step, without the time to the first token; None where that is not known."""
    known = [answer for answer in answers if "first" in answer]
    steps = sum(answer["steps"] for answer in known)
    return sum(answer["seconds"] - answer["first"] for answer in known) / steps if steps else None


def of(record: Row, **labels: Any) -> list[Row]:
    """The answers with these labels."""
    return [answer for answer in record["answers"] if all(answer[key] == value for key, value in labels.items())]


def paired(ours: Iterable[Row], theirs: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Two sides' answers to the same prompts, each prompt once."""
    known = {answer["prompt"]: answer for answer in theirs}
    return [(answer, known[answer["prompt"]]) for answer in ours if answer["prompt"] in known]


def ratio(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Acceptance length of the first over that of the second."""
    return _over(length(a for a, _ in pairs), length(b for _, b in pairs))


def ratio_error(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Standard error of ``ratio`` over prompts (jackknife); None of fewer than two."""
    parts = [ratio([*pairs[:place], *pairs[place + 1 :]]) for place in range(len(pairs))]
    known = [part for part in parts if part is not None]
    return jackknife_error(known) if len(known) > 1 else None


def smoothed(answers: Sequence[Row], window: int = SMOOTHING) -> list[tuple[float, float]]:
    """(seconds since the stream began, acceptance length) of each answer with those before it, at most ``window``."""
    points = []
    in_turn = sorted(answers, key=lambda answer: float(answer["at"]))  # several clients' come as they end
    for place, answer in enumerate(in_turn):
        value = length(in_turn[max(0, place + 1 - window) : place + 1])
        if value is not None:
            points.append((answer["at"], value))
    return points


def summary(record: Row) -> list[Row]:
    """Rows of the part's table."""
    rows = {"switch": _switch_rows, "memory": _memory_rows, "load": _load_rows}
    return rows.get(record["plan"]["part"], _gain_rows)(record)


def _gain_rows(record: Row) -> list[Row]:
    """By side and domain; the mean over domains last."""
    plan = record["plan"]
    rows = []
    for side in plan["sides"]:
        of_side = [_gain_row(record, side, domain) for domain in plan["domains"]]
        of_side = [row for row in of_side if row["length"] is not None]
        rows += of_side
        if len(of_side) > 1:
            rows.append(_mean_row(of_side))
    return rows


def _gain_row(record: Row, side: str, domain: str) -> Row:
    base = record["plan"]["sides"][0]
    ours = of(record, side=side, domain=domain, phase=HELD_OUT)
    pairs = paired(ours, of(record, side=base, domain=domain, phase=HELD_OUT))
    stream = of(record, side=side, domain=domain, phase=STREAM)
    both = [a for a, _ in pairs], [b for _, b in pairs]
    return {
        "side": side,
        "domain": domain,
        "prompts": len(ours),
        "length": length(ours),
        "to_base": ratio(pairs),
        "to_base_error": ratio_error(pairs),
        "tokens_per_second": speed(ours),
        "speed_to_base": _over(*map(speed, both)),
        "decode_to_base": _over(*map(decode_speed, both)),
        "first_seconds": first_seconds(ours),
        "step_seconds": step_seconds(ours),
        "stream_tokens": sum(answer["tokens"] for answer in stream),
        "stream_minutes": max((answer["at"] + answer["seconds"] for answer in stream), default=0.0) / 60,
        **_last_state(record, side, domain),
    }


def _over(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _mean_row(rows: Sequence[Row]) -> Row:
    """Means over domains, of ratios too; counts are sums."""
    mean: Row = {"side": rows[0]["side"], "domain": "mean"}
    for name in _MEANS:
        values = [row[name] for row in rows if row[name] is not None]
        mean[name] = fmean(values) if values else None
    errors = [row["to_base_error"] for row in rows if row["to_base_error"] is not None]
    mean["to_base_error"] = math.hypot(*errors) / len(errors) if errors else None
    for name in ("prompts", "stream_tokens", "stream_minutes", "updates", "published", "refused", "rolled_back"):
        mean[name] = sum(row[name] for row in rows)
    return mean


def _last_state(record: Row, side: str, tenant: str) -> Row:
    """Counts of a tenant's adapter at the end of its stream."""
    states = [state for state in record["states"] if (state["side"], state["tenant"]) == (side, tenant)]
    last = states[-1] if states else {}
    return {name: last.get(f"num_{name}", 0) for name in ("updates", "published", "refused", "rolled_back")}


def _switch_rows(record: Row) -> list[Row]:
    """By side: the first topic's held-out prompts before and after the second topic's stream."""
    plan = record["plan"]
    base, (first, second) = plan["sides"][0], plan["domains"][:2]
    rows = []
    for side in plan["sides"]:
        learned = of(record, side=side, domain=first, phase=HELD_OUT)
        returned = of(record, side=side, domain=first, phase=RETURN)
        fixed = of(record, side=base, domain=first, phase=HELD_OUT)
        lengths = [length(answers) for answers in (fixed, learned, returned)]
        rows.append(
            {
                "side": side,
                "first": lengths[1],
                "returned": lengths[2],
                "second": length(of(record, side=side, domain=second, phase=HELD_OUT)),
                "gained": share(lengths[1], lengths[0]),
                "lost": lost_share(*lengths),
                "error": ratio_error(paired(returned, learned)),
                "stream_tokens": sum(answer["tokens"] for answer in of(record, side=side, phase=STREAM)),
            }
            | _last_state(record, side, "switch")
        )
    return rows


def share(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs, less one."""
    over = _over(ours, theirs)
    return None if over is None else over - 1


def lost_share(base: float | None, learned: float | None, returned: float | None) -> float | None:
    """Share of the acceptance gained on a topic that is lost after another; None where nothing was gained."""
    if base is None or learned is None or returned is None or learned <= base:
        return None
    return (learned - returned) / (learned - base)


def _memory_rows(record: Row) -> list[Row]:
    """Megabytes by side."""
    runs = record["runs"]
    base = next((run["engine_most"] for run in runs if run["side"] == record["plan"]["sides"][0]), None)
    rows = []
    for run in runs:
        worker = run.get("worker_most", 0)
        rows.append(
            {
                "side": run["side"],
                "engine": run["engine_most"] / 1e6,
                "worker": worker / 1e6,
                "sum": (run["engine_most"] + worker) / 1e6,
                "engine_over_base": (run["engine_most"] - base) / 1e6 if base else None,
                "worker_ready": run.get("worker_ready", 0) / 1e6,
                "worker_net": (worker - run.get("worker_ready", 0)) / 1e6,
            }
            | _last_state(record, run["side"], record["plan"]["domains"][0])
        )
    return rows


def _load_rows(record: Row) -> list[Row]:
    """Medians over rounds; ratios within rounds, to the first side."""
    base = {run["round"]: run for run in record["runs"] if run["side"] == record["plan"]["sides"][0]}
    rows = []
    for side in record["plan"]["sides"]:
        runs = [run for run in record["runs"] if run["side"] == side and run["round"] in base]
        if runs:
            row: Row = {"side": side, "rounds": len(runs), "updates": max(run["updates"] for run in runs)}
            for name in ("tokens_per_second", "itl_p50", "itl_p99", "worker_cores", "noise"):
                row[name] = median(run[name] for run in runs)
            for name in ("tokens_per_second", "itl_p99"):
                row[f"{name}_to_base"] = sorted(run[name] / base[run["round"]][name] for run in runs)
            rows.append(row)
    return rows
