"""That no draft changes an answer, on real models and prompts in float32: ``python -m benchmarks.exactness``.

Every way to serve answers the same prompts as a plain engine that answers them one by one: batched, preempted, with
drafts of 0 to 6 tokens, of a draft with random weights, from a vocabulary so small that most tokens are outside.
Greedy, and sampled from one seed with five sets of parameters. Anything but all equal is a bug.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.common.environment import environment
from benchmarks.common.in_process import MAX_MODEL_LEN, Engine
from benchmarks.common.machine import write_record
from benchmarks.prompts.build import Prompt
from benchmarks.prompts.sets import mixed_prompts
from evospec.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from evospec.engine.messages import Grammar, SamplingParams
from evospec.engine.models.eagle3 import Eagle3, save_draft
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.speculation.drafters.head import COUNTS_FILE

BATCH = 8
FEW_BLOCKS = 48
"""Of 16 tokens: a batch that was admitted does not stay, if its answers grow by several blocks."""
GROWTH = 2
"""How many times as long those answers are."""
_SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
GREEDY = {"greedy": SamplingParams(max_tokens=0, seed=0, temperature=0.0)}
SAMPLED = {
    "temperature 1": SamplingParams(max_tokens=0, seed=1),
    "top-k, top-p": SamplingParams(max_tokens=0, seed=2, temperature=0.7, top_k=40, top_p=0.9),
    "penalties": SamplingParams(
        max_tokens=0, seed=3, presence_penalty=0.8, frequency_penalty=0.5, repetition_penalty=1.2
    ),
    "bias, min-p": SamplingParams(max_tokens=0, seed=4, temperature=1.3, min_p=0.05, logit_bias={5: 2.0, 9: -100.0}),
    "JSON grammar": SamplingParams(max_tokens=0, seed=5, grammar=Grammar("json_schema", json.dumps(_SCHEMA))),
}


class Part(StrEnum):
    """What is compared; "sampled" takes longest."""

    GREEDY = "greedy"
    SAMPLED = "sampled"
    PREEMPTED = "preempted"


@dataclass(frozen=True)
class Way:
    """One engine. ``draft``: a directory, a model's name for the method draft_model, or None for the shipped one."""

    name: str
    method: str = "none"
    draft: str | None = None
    vocabulary: str = "full"
    length: int = 4
    batch: int = BATCH
    num_blocks: int | None = None

    def config(self, model: str) -> EngineConfig:
        """In float32, with fixed draft lengths."""
        speculation = {"method": self.method, "draft": self.draft, "vocabulary": self.vocabulary, "adaptive": False}
        return EngineConfig(
            model=ModelConfig(name=model, dtype="float32", max_model_len=MAX_MODEL_LEN),
            cache=CacheConfig(num_blocks=self.num_blocks, prefix_caching=self.num_blocks is None),
            scheduler=SchedulerConfig(max_num_seqs=self.batch),
            speculation=SpeculationConfig.model_validate({**speculation, "num_speculative_tokens": self.length}),
        )


@dataclass(frozen=True)
class Result:
    """How many answers of a way and a set of parameters are those of plain decoding, and what the way went through."""

    way: str
    parameters: str
    prompts: int
    equal: int
    tokens: int
    drafted: int
    accepted: int
    preemptions: int


def ways(method: str, draft: str | None, random_draft: str) -> Iterator[Way]:
    """All that are compared with ``Way("plain")``; ``random_draft``: a directory with token counts."""
    yield Way("plain, batch")
    for length in range(1, 7):  # 0 is plain
        yield Way(f"drafts of {length}, batch", method, draft, length=length)
    yield Way("random draft, batch", "eagle3", random_draft)
    yield Way("random draft, 64 tokens, batch", "eagle3", random_draft, "static:64")
    if method == "eagle3":
        yield Way("drafts of 4, 64 tokens, batch", method, draft, "static:64")
        yield Way("drafts of 4, own words, batch", method, draft, "dynamic:64+64")
    yield Way("drafts of 4, alone", method, draft, batch=1)


def few_blocks(method: str, draft: str | None) -> list[Way]:
    """Ways in which sequences lose their blocks and are computed again."""
    name = "few blocks, batch"
    return [
        Way(f"plain, {name}", num_blocks=FEW_BLOCKS),
        Way(f"drafts of 4, {name}", method, draft, num_blocks=FEW_BLOCKS),
    ]


def groups_of(
    parts: Sequence[Part], prompts: Sequence[Prompt], max_tokens: int, method: str, draft: str | None, random_draft: str
) -> Iterator[tuple[Sequence[Prompt], dict[str, SamplingParams], list[Way]]]:
    """Prompts, and the parameters and ways to answer them: all of them greedily, and half of them sampled."""
    half, everything = max(1, len(prompts) // 2), list(ways(method, draft, random_draft))
    if Part.GREEDY in parts:
        yield prompts, _sized(GREEDY, max_tokens), everything
    if Part.SAMPLED in parts:
        yield prompts[:half], _sized(SAMPLED, max_tokens), everything
    if Part.PREEMPTED in parts:
        for name, of_name in (("greedy", prompts), ("penalties", prompts[: max(BATCH, half)])):
            long = {f"{name}, long": (GREEDY | SAMPLED)[name]}
            yield of_name, _sized(long, GROWTH * max_tokens), few_blocks(method, draft)


def _sized(params: dict[str, SamplingParams], max_tokens: int) -> dict[str, SamplingParams]:
    return {name: msgspec.structs.replace(one, max_tokens=max_tokens) for name, one in params.items()}


def make_random_draft(model: str, directory: Path) -> str:
    """An EAGLE-3 layer of random weights that fits the model, and random token counts."""
    files = resolve_model(ModelConfig(name=model))
    spec = validate_model_files(files)
    torch.manual_seed(0)
    shape = Eagle3Config.for_target(spec, files.name, (2, spec.num_layers // 2, spec.num_layers - 2), 512)
    save_draft(Eagle3(shape), directory)
    save_file({"counts": torch.randint(0, 1000, (spec.vocab_size,))}, directory / COUNTS_FILE)
    return str(directory)


def compare(
    model: str, way: Way, prompts: Sequence[Prompt], params: dict[str, SamplingParams], expected: dict[str, list[Any]]
) -> Iterator[Result]:
    """One result for each set of parameters that has an answer in ``expected``; the way "plain" fills it in."""
    engine = Engine(way.config(model))
    for name, sampling in params.items():
        before = engine.core.stats().preemptions
        generation = engine.generate(prompts, sampling, way.batch)
        reference = expected.setdefault(name, generation.answers)
        equal = sum(a == b for a, b in zip(generation.answers, reference, strict=True))
        drafted, accepted = (sum(pair[i] for pair in generation.verified) for i in (0, 1))
        preemptions = engine.core.stats().preemptions - before
        yield Result(way.name, name, len(prompts), equal, generation.num_tokens, drafted, accepted, preemptions)


def table_of(model: str, results: Sequence[Result], max_tokens: int) -> Table:
    title = f"{model}, float32: answers of up to {max_tokens} tokens ({GROWTH} times as many where blocks are few)"
    table = Table("answers", "parameters", title=title)
    for header in ("prompts", "equal", "tokens", "accepted / drafted", "preemptions"):
        table.add_column(header, justify="right")
    for r in results:
        counts = f"{r.accepted} / {r.drafted}"
        table.add_row(r.way, r.parameters, str(r.prompts), str(r.equal), str(r.tokens), counts, str(r.preemptions))
    return table


def main(
    model: Annotated[str, typer.Option(help="Target.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="Of the draft: eagle3, draft_model, ngram.")] = "eagle3",
    draft: Annotated[str | None, typer.Option(help="Directory or model; default: the one shipped.")] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="From all domains, answered greedily; half of them sampled.")
    ] = 40,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 24,
    part: Annotated[list[Part] | None, typer.Option(help="Repeatable; default: all.")] = None,
    name: Annotated[str, typer.Option(help="Name of the file in benchmarks/results.")] = "exactness",
) -> None:
    """Prints a table, writes a JSON file; exits 1 where an answer differs."""
    console, parts = Console(width=150), part or list(Part)
    chosen = mixed_prompts(model, prompts)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        random_draft = make_random_draft(model, Path(folder) / "random")
        for of_group, params, group_ways in groups_of(parts, chosen, max_tokens, method, draft, random_draft):
            expected: dict[str, list[Any]] = {}
            todo = [Way("plain, alone", batch=1), *group_ways]
            for way in track(todo, console=console, description=", ".join(params)):
                results += compare(model, way, of_group, params, expected)
    console.print(table_of(model, results, max_tokens))
    settings: dict[str, Any] = {"model": model, "method": method, "draft": draft, "parts": parts}
    settings |= {"prompts": prompts, "max_tokens": max_tokens}
    record = {"environment": environment(), "settings": settings, "results": [asdict(result) for result in results]}
    write_record(name, record)
    if any(result.equal < result.prompts for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
