"""``evospec bench``: how fast any server that speaks OpenAI's API answers, at one or several loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from evospec.server.bench.load import LoadOptions, LoadReport, Messages, Percentiles, new_progress, run_load
from evospec.server.remote import Remote
from evospec.server.tenants import CLIENT_KEY

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that says whether a word is a palindrome, with tests.",
    "What are the symptoms of iron deficiency, and how is it treated?",
    "Explain the difference between a patent and a trademark.",
    "Tell a short story about a lighthouse keeper who finds a letter.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take? Explain each step.",
    "List the planets of the solar system with one fact about each, as a table.",
    "Translate into French: The meeting has been moved to Thursday, because the room is taken.",
)
"""What is asked where no file says what."""


def bench(
    url: Annotated[str, typer.Argument(help="Of any server that speaks OpenAI's API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server has.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=CLIENT_KEY, help="If the server wants one.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once [1]; repeatable.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Default: 4 times the concurrency, at least 8.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="All answers are max_tokens long.")] = False,
    prompts: Annotated[Path | None, typer.Option(help='JSON lines: {"messages": [...]} or {"prompt": "..."}.')] = None,
    output: Annotated[
        typer.FileTextWrite | None, typer.Option(lazy=False, help="Write what was measured here, too, as JSON.")
    ] = None,
) -> None:
    """Measure how fast a server answers: tokens a second, times to and between tokens, tokens a step."""
    remote, console = Remote(url, api_key), Console()
    name, conversations = model or remote.first_model(), read_prompts(prompts)
    reports: dict[int, LoadReport] = {}
    first = 0  # each level gets prompts that no earlier one has put into a prefix cache, while there are some
    with new_progress(console) as progress:
        for level in dict.fromkeys(concurrency or [1]):
            options = LoadOptions(
                url=remote.url,
                model=name,
                concurrency=level,
                num_requests=requests or max(8, 4 * level),
                max_tokens=max_tokens,
                warmup_requests=level,
                temperature=temperature,
                ignore_eos=ignore_eos,
                api_key=api_key,
            )
            rotated = [*conversations[first:], *conversations[:first]]
            reports[level], _ = uvloop.run(run_load(options, rotated, progress))
            first = (first + options.num_requests) % len(conversations)
    console.print(report_table(f"{name} at {remote.url}, at most {max_tokens} tokens an answer", reports))
    for message in sorted({message for report in reports.values() for message in report.error_messages}):
        console.print(message, style="red", markup=False)
    if output is not None:
        json.dump({str(level): asdict(report) for level, report in reports.items()}, output, indent=2)
    if any(report.errors for report in reports.values()):
        raise typer.Exit(1)


def read_prompts(path: Path | None) -> Sequence[Messages]:
    """The conversations of a file of JSON lines, else ``PROMPTS``; raises ``typer.BadParameter``."""
    if path is None:
        return [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        found = [line.get("messages") or [{"role": "user", "content": line["prompt"]}] for line in lines]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise typer.BadParameter(f"cannot read prompts from {path}: {error!r}") from error
    if not found:
        raise typer.BadParameter(f"no prompts in {path}")
    return found


def report_table(title: str, reports: dict[int, LoadReport]) -> Table:
    """A column for each concurrency."""
    table = Table(title=title)
    table.add_column("requests at once")
    for level in reports:
        table.add_column(str(level), justify="right")
    rows = [_figures(report) for report in reports.values()]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _figures(report: LoadReport) -> dict[str, str]:
    steps = report.tokens_per_step
    return {
        "tokens/s": f"{report.tokens_per_second:.1f}",
        "tokens/step": "not told" if steps is None else f"{steps:.2f}",
        "first token, ms: p50 p90 p99": _milliseconds(report.ttft),
        "between tokens, ms: p50 p90 p99": _milliseconds(report.tpot),
        "between events, ms: p50 p90 p99": _milliseconds(report.itl),
        "errors/requests": f"{report.errors}/{report.requests}",
    }


def _milliseconds(times: Percentiles) -> str:
    return " ".join(f"{1000 * seconds:.1f}" for seconds in (times.p50, times.p90, times.p99))
