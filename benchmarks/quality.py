"""What the arithmetic of serving costs in quality: ``python -m benchmarks.quality``.

The model's distributions of the next token as EvoSpec computes them when it serves, and as llama.cpp does
(``llama-perplexity``, same file, same tokens), are compared with those of the same weights in float32. Texts are cut
into chunks; the second half of a chunk's positions count, as llama.cpp has it, so that none is without context.
"""

from __future__ import annotations

import struct
import subprocess
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import expm1, sqrt
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Annotated, BinaryIO

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.environment import environment
from benchmarks.common.in_process import engine_config, load_target
from benchmarks.common.machine import write_record
from benchmarks.prompts.build import read_eval
from benchmarks.prompts.sets import evaluation_files, read_sets
from benchmarks.serve.peers import LlamaCpp, gguf_path
from evospec.engine.config import CacheConfig, EngineConfig, SpeculationConfig
from evospec.engine.messages import SamplingParams
from evospec.engine.model_runner import ModelRunner
from evospec.engine.request import Request
from evospec.engine.step import ScheduledSequence

CHUNK = 512
FIRST = CHUNK // 2
"""The first position of a chunk that counts."""
ROWS = 4
"""Positions of a step, as when three drafts are verified."""
_NOTHING = 1e-9
SERVED, LLAMA = "EvoSpec", "llama.cpp"
LLAMA_CPP, PERPLEXITY = LlamaCpp(), "llama-perplexity"
DOMAINS = {"law": ("law",), "medicine": ("medicine",), "general": ("mt_bench", "qa", "rag")}


@dataclass
class Distance:
    """From float32, one value for each position."""

    divergence: list[float] = field(default_factory=list)
    """Of Kullback and Leibler, in nats."""
    same_top: list[float] = field(default_factory=list)
    """1 where the most likely token is the same, else 0."""
    surprise: list[float] = field(default_factory=list)
    """By how many nats the text's next token is less likely."""

    def add(
        self, reference: torch.Tensor, log_probs: torch.Tensor, following: torch.Tensor, known: torch.Tensor
    ) -> None:
        """Positions [n, vocab] of log-probabilities, and the tokens [n] that follow them.

        Those that are not ``known`` [n, vocab] count as one token: llama.cpp writes nothing below 16 nats.
        """
        p, q = ((one.exp() * known).double() for one in (reference, log_probs))
        rest_p, rest_q = ((1 - one.sum(1)).clamp(min=_NOTHING) for one in (p, q))
        of_known = (p * (reference - log_probs)).nan_to_num().sum(1)
        self.divergence += (of_known + rest_p * (rest_p / rest_q).log()).tolist()
        self.same_top += (reference.argmax(1) == log_probs.argmax(1)).double().tolist()
        self.surprise += (reference - log_probs).gather(1, following[:, None])[:, 0].tolist()


class Chunks:
    """Log-probabilities of chunks of text by this project's model.

    ``rows``: how many positions are computed at once, after the first half.
    """

    def __init__(self, config: EngineConfig, rows: int) -> None:
        self._runner = ModelRunner(load_target(config), config.cache)
        self._rows = rows

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """[``CHUNK`` - 1 - ``FIRST``, vocab] float32 of the positions that count."""
        request = Request("chunk", b"", "", SamplingParams(max_tokens=1, seed=0), tokens[:FIRST])
        self._execute(request, tokens, 0, FIRST)
        ranges = ((start, min(start + self._rows, CHUNK - 1)) for start in range(FIRST, CHUNK - 1, self._rows))
        return torch.cat([self._execute(request, tokens, *positions) for positions in ranges])

    def _execute(self, request: Request, tokens: list[int], start: int, end: int) -> torch.Tensor:
        blocks = array("i", range(self._runner.num_blocks))
        step = ScheduledSequence(request, start, tokens[start:end], 0, 0, end - start, blocks)
        return self._runner.execute([step])[0].log_softmax(1)


def llama_chunks(model: Path, text: Path, count: int, scratch: Path) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Tokens [``CHUNK``] of each chunk, and llama.cpp's log-probabilities of the positions that count."""
    command = [str(LLAMA_CPP.binary(PERPLEXITY)), "--model", str(model), "--file", str(text)]
    sizes = ["--ctx-size", str(CHUNK), "--batch-size", str(CHUNK), "--chunks", str(count), "--threads", "2"]
    written = ["--flash-attn", "on", "--kl-divergence-base", str(scratch)]
    subprocess.run([*command, *sizes, *written], check=True, capture_output=True)
    with scratch.open("rb") as file:
        magic, size, num_tokens, chunks = struct.unpack("<8s3i", file.read(20))
        if (magic, size, chunks) != (b"_logits_", CHUNK, count):
            raise ValueError(f"{text} has {chunks} chunks, not {count}")
        tokens = np.frombuffer(file.read(4 * CHUNK * count), np.int32).reshape(count, CHUNK)
        for chunk in tokens:
            yield chunk.tolist(), torch.stack([_row(file, num_tokens) for _ in range(FIRST, CHUNK - 1)])


def _row(file: BinaryIO, num_tokens: int) -> torch.Tensor:
    """A position: 16 bits for each token, from the least likely to the most, or 16 nats below it."""
    width = num_tokens + num_tokens % 2
    scale, least = map(float, struct.unpack("<2f", file.read(8)))
    codes = torch.from_numpy(np.frombuffer(file.read(2 * width), np.uint16)[:num_tokens].astype(np.float32))
    return codes * scale + least


def compare(model: str, texts: Mapping[str, str], count: int, console: Console) -> dict[str, dict[str, Distance]]:
    """Distances by side and domain, of ``count`` chunks a domain."""
    config = engine_config(model, SpeculationConfig(method="none"))
    config = config.model_copy(update={"cache": CacheConfig(num_blocks=CHUNK // config.cache.block_size)})
    exact_model = config.model.model_copy(update={"dtype": "float32"})
    exact, served = Chunks(config.model_copy(update={"model": exact_model}), CHUNK), Chunks(config, ROWS)
    torch.set_num_threads(2)
    distances: dict[str, dict[str, Distance]] = {SERVED: {}, LLAMA: {}}
    with TemporaryDirectory() as directory:
        for domain, text in texts.items():
            file, scratch = Path(directory, "text"), Path(directory, "log-probabilities")
            file.write_text(text)
            ours, theirs = distances[SERVED][domain], distances[LLAMA][domain] = Distance(), Distance()
            for tokens, log_probs in llama_chunks(gguf_path(model), file, count, scratch):
                reference = exact.log_probs(tokens)
                following = torch.tensor(tokens[FIRST + 1 :])
                known = log_probs > log_probs.amin(1, keepdim=True)
                ours.add(reference, served.log_probs(tokens), following, known)
                theirs.add(reference, log_probs, following, known)
            console.print(f"[dim]{model}, {domain}: {len(ours.same_top)} positions[/dim]")
    return distances


def averages(distances: Mapping[str, Distance]) -> dict[str, dict[str, tuple[float, float]]]:
    """Means and standard errors of what ``Distance`` has, by domain and over all."""
    everything = Distance()
    for one in distances.values():
        for name, values in vars(one).items():
            vars(everything)[name] += values
    return {
        domain: {name: (fmean(values), stdev(values) / sqrt(len(values))) for name, values in vars(one).items()}
        for domain, one in {**distances, "all": everything}.items()
    }


def table(sides: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]], title: str) -> Table:
    lines = Table("side", "text", "KL, nats", "same most likely token, %", "perplexity, % more", title=title)
    for side, of_side in sides.items():
        for domain, one in of_side.items():
            divergence, divergence_error = one["divergence"]
            same, same_error = one["same_top"]
            surprise, surprise_error = one["surprise"]
            lines.add_row(
                *(side, domain, f"{divergence:.5f} ± {divergence_error:.5f}"),
                f"{100 * same:.2f} ± {100 * same_error:.2f}",
                f"{100 * expm1(surprise):.2f} ± {100 * surprise_error:.2f}",
            )
    return lines


def main(
    model: Annotated[list[str], typer.Option(help="Registry names.")] = ["smollm2-135m", "qwen2.5-coder-0.5b"],  # noqa: B006
    chunks: Annotated[int, typer.Option(help=f"Of {CHUNK} tokens, of each domain.")] = 20,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "quality",
) -> None:
    """Compare, print and write the record."""
    console = Console(width=140)
    sets = read_sets(evaluation_files(), 1000)
    texts = {
        domain: "\n\n".join(prompt[0]["content"] for name in names for prompt in sets[name])
        for domain, names in DOMAINS.items()
    }
    texts["code"] = "\n\n".join(prompt.messages[0]["content"] for prompt in read_eval(["code"]))
    LLAMA_CPP.install(PERPLEXITY)
    record: dict[str, object] = {"environment": environment()}
    for one in model:
        sides = {side: averages(by_domain) for side, by_domain in compare(one, texts, chunks, console).items()}
        console.print(table(sides, one))
        record[one] = sides
    write_record(name, record)


if __name__ == "__main__":
    typer.run(main)
