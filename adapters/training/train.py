"""Trains the draft of a model on what ``adapters.training.generate`` has written: ``evospec train-draft MODEL``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from adapters.training.conversations import data_directory, text_directory
from adapters.training.trainer import Phase, TrainConfig, Trainer
from engine.config import ModelConfig
from engine.machine import available_cores
from engine.models.eagle3_config import recorded_layers
from engine.models.registry import resolve_model, validate_model_files
from engine.models.weights import open_weights
from engine.speculation.draft_files import DRAFTS


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of the target.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the draft; default: drafts/<model>.")] = None,
    one_step: Annotated[int, typer.Option(help="Positions of the one-step phase.")] = 6_000_000,
    unrolled: Annotated[int, typer.Option(help="Positions of the unrolled phase.")] = 3_000_000,
    steps: Annotated[int, typer.Option(help="Unrolled steps.")] = 5,
    intermediate_size: Annotated[int, typer.Option(help="Width of the MLP; 0: the target's.")] = 0,
    start_from: Annotated[Path | None, typer.Option(help="Directory of a draft to train further.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Of the first phase, after a warm-up; at width 576.")] = 5e-4,
    unrolled_learning_rate: Annotated[float, typer.Option(help="Of the second phase, falling to its end.")] = 5e-4,
    batch_tokens: Annotated[int, typer.Option(help="Padded positions in a batch.")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(help="Compute threads; 0: one a core.")] = 0,
    run: Annotated[str, typer.Option(help="Name of the run: of its checkpoints.")] = "default",
) -> None:
    """Trains from the last checkpoint of the run on; every validation writes the draft."""
    torch.set_num_threads(threads or available_cores())
    files = resolve_model(ModelConfig(name=model))
    spec = validate_model_files(files)
    both = (
        Phase(one_step, 1, learning_rate, batch_tokens),
        Phase(unrolled, steps, unrolled_learning_rate, batch_tokens),
    )
    config = TrainConfig(
        capture_layers=recorded_layers(spec)[:-1],
        intermediate_size=intermediate_size or spec.intermediate_size,
        phases=tuple(phase for phase in both if phase.anchors),
        start_from=start_from,
        seed=seed,
    )
    directory, text, output = data_directory(files.name), text_directory(files.name), output or DRAFTS / files.name
    weights, checkpoints = open_weights(files), directory / "runs" / run
    trainer = Trainer(config, spec, weights, files.name, directory, text, checkpoints, output)
    if start_from is not None and trainer.is_finished:
        raise typer.BadParameter(f"{run} is finished; training a draft further is another run", param_hint="--run")
    trainer.run()
    record = {"command": ["evospec", "train-draft", *sys.argv[1:]], "validations": trainer.progress.history}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
