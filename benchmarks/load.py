"""Load generator for any OpenAI-compatible server.

``python -m benchmarks.load --url http://127.0.0.1:8000 --concurrency 8 --requests 32``
"""

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

from benchmarks.common.load import LoadOptions, LoadReport, new_progress, run_load
from benchmarks.prompts.build import read_eval


def report_table(title: str, rows: Sequence[tuple[str, LoadReport]]) -> Table:
    """One line a run; times in milliseconds."""
    table = Table(title=title)
    table.add_column("run")
    for header in ("tok/s", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "TPOT p50", "errors", "client µs/tok"):
        table.add_column(header, justify="right")
    for name, report in rows:
        times = [report.ttft.p50, report.ttft.p90, report.ttft.p99, report.itl.p50, report.itl.p90, report.itl.p99]
        table.add_row(
            name,
            f"{report.tokens_per_second:.1f}",
            *(f"{1e3 * value:.1f}" for value in [*times, report.tpot.p50]),
            f"{report.errors}/{report.requests}",
            f"{1e6 * report.client_cpu_per_token:.0f}",
        )
    return table


def main(
    url: Annotated[str, typer.Option(help="Base URL, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name the server knows.")] = "smollm2-135m",
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests in flight; repeatable.")] = None,
    requests: Annotated[int, typer.Option(help="Requests per concurrency; 0: four times the concurrency.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens per request.")] = 128,
    warmup: Annotated[int, typer.Option(help="Requests before measuring; -1: as many as the concurrency.")] = -1,
    temperature: Annotated[float, typer.Option()] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Generate max_tokens whatever the model says.")] = True,
    chat: Annotated[bool, typer.Option(help="Chat completions; otherwise plain completions.")] = True,
    domain: Annotated[list[str] | None, typer.Option(help="Only these domains' prompts.")] = None,
    max_seconds: Annotated[float, typer.Option(help="No request starts later than this.")] = 600.0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the reports here as JSON.")] = None,
) -> None:
    """Measures a running server; exits with 1 when a request failed."""
    console = Console()
    prompts = [prompt.messages for prompt in read_eval(domain)]
    rows = []
    offset = 0  # each level gets prompts that no earlier one has put into a prefix cache
    with new_progress(console) as progress:
        for level in concurrency or [1, 8, 32]:
            options = LoadOptions(
                url=url.rstrip("/"),
                model=model,
                concurrency=level,
                num_requests=requests or 4 * level,
                max_tokens=max_tokens,
                warmup_requests=level if warmup < 0 else warmup,
                temperature=temperature,
                ignore_eos=ignore_eos,
                chat=chat,
                max_seconds=max_seconds,
                api_key=api_key,
            )
            report, _ = uvloop.run(run_load(options, prompts[offset:] + prompts[:offset], progress))
            offset = (offset + options.num_requests) % len(prompts)
            rows.append((f"concurrency {level}", report))
    console.print(report_table(f"{model} at {url}, {max_tokens} tokens a request", rows))
    for name, report in rows:
        for message in report.error_messages:
            console.print(f"[red]{name}: {message}[/red]")
    if output is not None:
        output.write_text(json.dumps({name: asdict(report) for name, report in rows}, indent=2))
    if any(report.errors for _, report in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
