"""What a long prompt costs those whose answers are under way: ``python -m benchmarks.late_prompt --url URL``.

Eight answers stream; then a prompt of about 2,000 tokens comes, and again, with others, a few times. Printed is the
longest time between two events of any stream, in the seconds before each prompt and while it is read.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from evospec.server.bench.stream import StreamResult, stream

STREAMS = 8
QUIET_SECONDS = 3.0
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school")


@dataclass(frozen=True)
class Late:
    """A late prompt; all times in seconds."""

    num_tokens: int
    first_token: float
    gap_before: float
    gap_while_read: float


def _body(model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def longest_gap(results: list[StreamResult], begin: float, end: float) -> float:
    """Seconds between two events of a stream, of which the second came between ``begin`` and ``end``."""
    pairs = (pair for one in results for pair in zip(one.token_times, one.token_times[1:], strict=False))
    return max((second - first for first, second in pairs if begin <= second <= end), default=0.0)


async def measure(url: str, model: str, words: int, times: int, max_tokens: int) -> list[Late]:
    """Streams of ``max_tokens``, and so many prompts of so many words."""
    rng, target = random.Random(0), f"{url}/v1/completions"
    texts = [f"Write down all that you know of the number {number}:" for number in range(STREAMS)]
    streams = [asyncio.create_task(stream(target, _body(model, text, max_tokens))) for text in texts]
    late = []
    for _ in range(times):
        await asyncio.sleep(QUIET_SECONDS)
        prompt = " ".join(rng.choices(WORDS, k=words))
        late.append(await stream(target, _body(model, prompt, 1)))
    results, found = list(await asyncio.gather(*streams)), []
    for one in late:
        begin, first = one.start, one.token_times[0]
        gaps = longest_gap(results, begin - QUIET_SECONDS, begin), longest_gap(results, begin, first)
        found.append(Late(one.prompt_tokens, first - begin, *gaps))
    return found


def main(
    url: Annotated[str, typer.Option(help="Base URL, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name the server knows.")] = "smollm2-135m",
    words: Annotated[int, typer.Option(help="Of each late prompt.")] = 2000,
    times: Annotated[int, typer.Option(help="Late prompts.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Of each stream.")] = 1500,
) -> None:
    """Measure a running server."""
    table = Table("prompt tokens", "first token, ms", "longest gap before, ms", "while it is read, ms", title=url)
    for one in asyncio.run(measure(url.rstrip("/"), model, words, times, max_tokens)):
        seconds = one.first_token, one.gap_before, one.gap_while_read
        table.add_row(str(one.num_tokens), *(f"{1e3 * value:.0f}" for value in seconds))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
