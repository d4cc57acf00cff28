"""What a prediction of the answer is worth: ``python -m benchmarks.prediction --url URL``.

Each prompt is answered once. Its answer, in which a tenth of the words are replaced by others, is then the prediction
of the same request, as if a text had been edited: here and there, or in one place. With and without it take turns, one
request at a time; all answers to a prompt have to be the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import geometric_mean, median, stdev
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.prompts.build import Prompt, read_eval

WORDS = ("blue", "seven", "river", "music", "paper", "green", "stone", "winter")
NONE, SCATTERED, TOGETHER = WAYS = "no prediction", "a tenth changed here and there", "a tenth changed in one place"


def edited(text: str, share: float, way: str, rng: random.Random) -> str:
    words = text.split(" ")
    count = max(round(share * len(words)), 1)
    first = rng.randrange(len(words) - count + 1)
    places = rng.sample(range(len(words)), count) if way == SCATTERED else range(first, first + count)
    for place in places:
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def ask(client: httpx.Client, body: dict[str, Any]) -> tuple[str, float]:
    started = time.perf_counter()
    response = client.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"]), seconds


def measure(url: str, model: str, prompts: Sequence[Prompt], max_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Median tokens a second of each prompt, by the ways of ``WAYS``."""
    rng, speeds = random.Random(0), {way: list[float]() for way in WAYS}
    with httpx.Client(base_url=url, timeout=600) as client:
        for prompt in prompts:
            body = {"model": model, "messages": prompt.messages, "max_tokens": max_tokens, "temperature": 0}
            body["ignore_eos"] = True
            answer, _ = ask(client, body)
            seconds = {way: list[float]() for way in WAYS}
            for way in WAYS * rounds:
                predicted = {"type": "content", "content": edited(answer, 0.1, way, rng)}
                again, taken = ask(client, body if way == NONE else body | {"prediction": predicted})
                assert again == answer, "a prediction has changed an answer"
                seconds[way].append(taken)
            for way in WAYS:
                speeds[way].append(max_tokens / median(seconds[way]))
    return speeds


def main(
    url: Annotated[str, typer.Option(help="Base URL, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name the server knows.")] = "smollm2-135m",
    count: Annotated[int, typer.Option(min=2, help="Prompts.")] = 12,
    max_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 3,
) -> None:
    """Measure a running server."""
    speeds = measure(url.rstrip("/"), model, read_eval(["general"])[:count], max_tokens, rounds)
    table = Table("", "tokens a second", "to no prediction", "standard error", title=f"{model}, {max_tokens} tokens")
    for way, of_way in speeds.items():
        ratios = [ours / without for ours, without in zip(of_way, speeds[NONE], strict=True)]
        error = stdev(ratios) / len(ratios) ** 0.5
        table.add_row(way, f"{geometric_mean(of_way):.0f}", f"{geometric_mean(ratios):.2f}", f"{error:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
