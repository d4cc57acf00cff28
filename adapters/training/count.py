"""Counts the target's own answers for draft vocabularies, tokens and bigrams: ``evospec vocab build MODEL``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import save_file

from evospec.adapters.training.conversations import data_directory, read_shard, shard_paths
from evospec.engine.config import ModelConfig
from evospec.engine.draft_vocab.bigram_graph import build_bigram_graph
from evospec.engine.models.config import ModelError
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.speculation.drafters.head import COUNTS_FILE
from evospec.engine.speculation.drafters.session_head import GRAPH_FILE

_SIZES = (1024, 2048, 4096, 8192, 16384, 32768)


def count_answers(shards: Iterable[Path], vocab_size: int) -> torch.Tensor:
    """How often each token was generated: [vocab_size] int64. Prompts are not the target's words, so not counted."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for path in shards:
        generated = [c.token_ids[c.prompt_length :] for c in read_shard(path)]
        counts += np.bincount(np.concatenate(generated), minlength=vocab_size)
    return torch.from_numpy(counts)


def answers(shards: Iterable[Path]) -> Iterator[NDArray[np.int32]]:
    """Token ids of each answer, with the prompt's last one before them."""
    for path in shards:
        for conversation in read_shard(path):
            yield conversation.token_ids[max(conversation.prompt_length - 1, 0) :]


def coverage(counts: torch.Tensor, sizes: Sequence[int]) -> list[float]:
    """Share of the counted tokens that are among the so many most frequent ones, for each size."""
    shares = counts.sort(descending=True).values.cumsum(0) / counts.sum()
    return [float(shares[size - 1]) for size in sizes]


def write_counts(counts: torch.Tensor, directory: Path) -> Path:
    """Write ``COUNTS_FILE`` into a directory, whole or not at all; returns its path."""
    path = directory / COUNTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"counts": counts}, partial)
    partial.rename(path)
    return path


def run(program: Callable[..., None]) -> None:
    """Run a command; a ``ModelError`` is one line and exit status 2."""
    try:
        typer.run(program)
    except ModelError as error:
        print(f"evospec: {error}", file=sys.stderr)
        sys.exit(2)


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of the target.")],
    output: Annotated[Path | None, typer.Option(help="Directory; default: drafts/<model>.")] = None,
) -> None:
    """Count tokens and bigrams of a model's generated answers, for speculation.vocabulary static:K and dynamic:K+S."""
    files = resolve_model(ModelConfig(name=model))
    data = data_directory(files.name)
    shards = shard_paths(data)
    if not shards:
        raise ModelError(f"{data}: no conversations; python -m evospec.adapters.training.generate makes them")
    counts = count_answers(shards, validate_model_files(files).vocab_size)
    path = write_counts(counts, output or DRAFTS / files.name)
    print(f"{path}: {int(counts.sum()):,} tokens, {int((counts > 0).sum()):,} distinct ones")
    graph = build_bigram_graph(answers(shards), len(counts))
    graph.save(path.with_name(GRAPH_FILE))
    print(f"{path.with_name(GRAPH_FILE)}: {len(graph.token_ids):,} bigrams")
    sizes = [size for size in _SIZES if size < len(counts)]
    for size, share in zip(sizes, coverage(counts, sizes), strict=True):
        print(f"  static:{size:<6} {share:7.2%}")


if __name__ == "__main__":
    run(main)
