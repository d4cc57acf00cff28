"""Tables and plot of a ``benchmarks.speculation`` record; ``python -m benchmarks.speculation.report FILE`` again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.drafting import NONE
from benchmarks.common.in_process import PARTS
from benchmarks.common.runs import ALL, Record, acceptance, runs_of
from benchmarks.speculation.summary import summaries, worst

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

LEAST_RATIO = 0.97
"""Over all domains speculation may never be slower than that."""
COLOURS = ["#6b7280", "#c2410c", "#1d4ed8", "#0f766e", "#a16207", "#7e22ce"]


def speed_tables(record: Record) -> Iterable[Table]:
    """Two tables a model, speed and drafting: a line for each concurrency and mode, medians over rounds."""
    plan = record["plan"]
    cells = {(c["model"], c["concurrency"], c["mode"], c["domain"]): c for c in summaries(record)}
    lengths = "adaptive" if plan["drafting"]["adaptive"] else "fixed"
    for model in plan["models"]:
        tokens = f"{'about' if plan.get('ignore_eos', True) else 'up to'} {plan['max_tokens']} tokens a request"
        what = f"{model}, greedy, {tokens}, {lengths} draft length"
        speed = _table(f"Speed: {what}", "tok/s", "/ none", "decode only", *plan["domains"], "other load %")
        drafts = _table(f"Drafts: {what}", *plan["domains"], "accepted by place", "drafts a step", *PARTS)
        for level in plan["levels"]:
            for mode in plan["modes"]:
                here = {domain: cells.get((model, level, mode, domain)) for domain in [*plan["domains"], ALL]}
                speed.add_row(str(level), mode, *_speed_cells(here, plan["domains"]))
                drafts.add_row(str(level), mode, *_draft_cells(here, plan["domains"]))
            speed.add_section()
            drafts.add_section()
        yield speed
        yield drafts


def _table(title: str, *headers: str) -> Table:
    table = Table("concurrency", "mode", title=title)
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _speed_cells(here: dict[str, Record | None], domains: Sequence[str]) -> list[str]:
    by_domain = [_number(here[domain], "ratio") for domain in domains]
    whole = here[ALL]
    if whole is None:
        return ["–", "–", "–", *by_domain, "–"]
    spread = f"{whole['ratio']:.2f} ({min(whole['ratios']):.2f}–{max(whole['ratios']):.2f})"
    speed = f"{whole['tokens_per_second']:.1f}"
    return [speed, spread, _number(whole, "decode_ratio"), *by_domain, f"{whole['noise']:.0f}"]


def _draft_cells(here: dict[str, Record | None], domains: Sequence[str]) -> list[str]:
    by_domain = [_number(here[domain], "acceptance_length") for domain in domains]
    whole = here[ALL]
    if whole is None:
        return [*by_domain, *["–"] * (2 + len(PARTS))]
    rates = " ".join(f"{rate:.2f}" for rate in whole["acceptance_rates"])
    return [*by_domain, rates, _number(whole, "drafts_a_step"), *(f"{whole['shares'][part]:.0%}" for part in PARTS)]


def _number(cell: Record | None, key: str) -> str:
    return "–" if cell is None or cell[key] is None else f"{cell[key]:.2f}"


def acceptance_table(record: Record) -> Table:
    """A line for each model, mode and domain; rates are of all drafts, as vLLM reports them."""
    plan = record["plan"]
    length = plan["drafting"]["num_tokens"]
    table = Table(title=f"Acceptance: greedy, every draft {length} tokens long, answers of up to {plan['max_tokens']}")
    for header in ("model", "mode", "domain"):
        table.add_column(header)
    for header in ("prompts", "drafts", "acceptance length", *(f"place {place + 1}" for place in range(length))):
        table.add_column(header, justify="right")
    for model in plan["models"]:
        for mode in plan["modes"]:
            for domain in [*plan["domains"], ALL]:
                runs = runs_of(record, model, mode, domain)
                counts = acceptance(runs)
                prompts = str(sum(run["prompts"] for run in runs))
                rates = [f"{rate:.3f}" for rate in counts.rates]
                table.add_row(model, mode, domain, prompts, str(counts.num_drafts), f"{counts.length:.2f}", *rates)
            table.add_section()
    return table


def plot_speed(record: Record, path: Path) -> None:
    """For each model: the ratio to none by concurrency, and acceptance length by domain at the lowest concurrency."""
    plan = record["plan"]
    models = plan["models"]
    figure, panels = plt.subplots(len(models), 2, figsize=(12, 4 * len(models)), squeeze=False)
    cells = {(c["model"], c["concurrency"], c["mode"], c["domain"]): c for c in summaries(record)}
    for (left, right), model in zip(panels, models, strict=True):
        for place, mode in enumerate(plan["modes"]):
            levels = [level for level in plan["levels"] if (model, level, mode, ALL) in cells]
            wholes = [cells[model, level, mode, ALL] for level in levels]
            values = [whole["ratio"] for whole in wholes]
            below = [value - min(whole["ratios"]) for value, whole in zip(values, wholes, strict=True)]
            above = [max(whole["ratios"]) - value for value, whole in zip(values, wholes, strict=True)]
            ticks = [plan["levels"].index(level) for level in levels]
            colour = COLOURS[place % len(COLOURS)]
            left.errorbar(ticks, values, [below, above], label=mode, color=colour, marker="o", capsize=2)
        left.axhline(LEAST_RATIO, color="#b91c1c", linewidth=0.8, linestyle="--")
        left.set_xticks(range(len(plan["levels"])), [str(level) for level in plan["levels"]])
        left.set(title=model, xlabel="concurrent sequences", ylabel="tok/s / tok/s without speculation")
        left.legend(frameon=False)
        lengths = {
            (mode, domain): (cells.get((model, plan["levels"][0], mode, domain)) or {}).get("acceptance_length")
            for mode in plan["modes"]
            for domain in plan["domains"]
        }
        _bars(right, lengths, [mode for mode in plan["modes"] if mode != NONE], plan["domains"])
        right.set_title(f"{model}, concurrency {plan['levels'][0]}")
    _save(figure, record, path)


def plot_acceptance(record: Record, path: Path) -> None:
    """For each model: acceptance length by domain, a bar for each mode."""
    plan = record["plan"]
    figure, panels = plt.subplots(1, len(plan["models"]), figsize=(6 * len(plan["models"]), 4), squeeze=False)
    for panel, model in zip(panels[0], plan["models"], strict=True):
        lengths = {
            (mode, domain): acceptance(runs_of(record, model, mode, domain)).length
            for mode in plan["modes"]
            for domain in plan["domains"]
        }
        _bars(panel, lengths, plan["modes"], plan["domains"])
        panel.set_title(model)
    _save(figure, record, path)


def _bars(
    panel: Axes, lengths: Mapping[tuple[str, str], float | None], modes: Sequence[str], domains: Sequence[str]
) -> None:
    width = 0.8 / max(1, len(modes))
    for index, mode in enumerate(modes):
        places = [tick + (index - (len(modes) - 1) / 2) * width for tick in range(len(domains))]
        heights = [lengths[mode, domain] or 0.0 for domain in domains]
        colour = COLOURS[(index + 1) % len(COLOURS)]
        panel.bar_label(panel.bar(places, heights, width, label=mode, color=colour), fmt="%.2f", fontsize=7)
    panel.set_xticks(range(len(domains)), domains)
    panel.margins(y=0.25)  # room for the legend
    panel.set(ylabel="acceptance length", ylim=(1, None))
    panel.legend(frameon=False, loc="upper center", ncols=max(1, len(modes)), fontsize=8)


def _save(figure: Any, record: Record, path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(record["environment"]["cpu"], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(record: Record, path: Path, console: Console) -> None:
    """Print the tables and draw ``path``."""
    if record["plan"]["kind"] == "acceptance":
        console.print(acceptance_table(record))
        plot_acceptance(record, path)
        return
    for table in speed_tables(record):
        console.print(table)
    for name, least in (
        ("all domains", worst(record, {ALL})),
        ("one domain", worst(record, record["plan"]["domains"])),
    ):
        if least is not None:
            console.print(
                f"Least ratio to none, {name}: {least['ratio']:.2f} ({least['model']}, {least['mode']}, "
                f"{least['domain']}, concurrency {least['concurrency']}); the bound is {LEAST_RATIO}"
            )
    plot_speed(record, path)


def main(record: Annotated[Path, typer.Argument(help="A JSON file of benchmarks.speculation.")]) -> None:
    """Prints the tables of a record and draws its plot again."""
    report(json.loads(record.read_text()), record.with_suffix(".png"), Console(width=170))


if __name__ == "__main__":
    typer.run(main)
