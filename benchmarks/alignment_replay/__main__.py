"""Online alignment replayed on recorded answers: ``python -m benchmarks.alignment_replay``.

For choosing the worker's options: its own parts (assembler, replay, trainer, guard) learn from the records that an
engine would have logged, without servers, and as fast as they can. The target answers stream prompts to learn from, and
trial prompts to measure with (``benchmarks.prompts.streams``), never evaluation prompts; the first run records them, in
minutes. The whole head, greedy, four drafts a step; a draft's entries are made with the weights in force. Every update
counts as one that pays, unless ``pace.step_seconds`` is given. What is learned of one domain is measured on all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.alignment_replay.recordings import recorded
from benchmarks.alignment_replay.worker import Replay, acceptance_length, configured
from benchmarks.common.draft_traces import load_parts
from benchmarks.prompts.sets import short
from benchmarks.prompts.streams import STREAM_DOMAINS, read_stream, stream_and_trial
from evospec.adapters.alignment.chains import ChainDrafter
from evospec.engine.config import ModelConfig
from evospec.engine.models.registry import resolve_model
from evospec.engine.text.tokenizer import Tokenizer


def main(
    domain: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of engine.alignment, repeatable.")] = None,
    model: Annotated[str, typer.Option(help="The target; an EAGLE-3 draft is shipped for it.")] = "smollm2-135m",
    stream: Annotated[int, typer.Option(min=1, help="Prompts to learn from, of each domain.")] = 120,
    trial: Annotated[int, typer.Option(min=1, help="Prompts to measure with, of each domain.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of an answer.")] = 128,
) -> None:
    """Prints, of each domain, the base draft's acceptance length, and how many times that learned drafts have it."""
    config = configured(option or [])
    base = ChainDrafter(*load_parts(model))
    title = f"{model}, the whole head, acceptance length on {trial} trial prompts; {' '.join(option or ['defaults'])}"
    table, tokenizer = Table("learned", title=title), Tokenizer.from_files(resolve_model(ModelConfig(name=model)))
    for header in ("stream tokens", "updates", "versions", "asked", "base", "in force", "latest"):
        table.add_column(header, justify="right")
    of_domain = {name: stream_and_trial(short(read_stream(), name, tokenizer)) for name in STREAM_DOMAINS}
    measured = {name: recorded(model, both[1][:trial], max_tokens, f"{name}-trial") for name, both in of_domain.items()}
    before = {name: acceptance_length(base, recordings) for name, recordings in measured.items()}
    for name in domain or STREAM_DOMAINS:
        learned = recorded(model, of_domain[name][0][:stream], max_tokens, f"{name}-stream")
        with tempfile.TemporaryDirectory() as directory:
            replay = Replay(base, config, Path(directory))
            for number, recording in enumerate(track(learned, description=f"learn {name}")):
                replay.serve(recording, str(number))
        aligner, updater = replay.aligner, replay.updater
        in_force = base if aligner.tensors is None else updater.drafter(aligner.tensors)
        drafters = in_force, updater.drafter(updater.published())
        counts = sum(len(recording.answer) for recording in learned), aligner.state.num_updates
        for asked, recordings in measured.items():
            ratios = (acceptance_length(drafter, recordings) / before[asked] for drafter in drafters)
            cells = f"{before[asked]:.3f}", *(f"{ratio:.3f}" for ratio in ratios)
            table.add_row(name, *map(str, counts), str(aligner.state.num_published), asked, *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
