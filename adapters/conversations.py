"""Conversations on disk: shards of token ids, appended and read back. No pickle, nothing but integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True)
class Conversation:
    """One answer of the target. ``token_ids[:prompt_length]`` is the prompt; ``key`` names prompt and sampling."""

    key: int
    prompt_length: int
    token_ids: npt.NDArray[np.int32]


def write_shard(directory: Path, conversations: Sequence[Conversation]) -> Path:
    """Append one shard, whole or not at all; shards are numbered in the order of writing."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{len(shard_paths(directory)):05}.safetensors"
    lengths = [len(conversation.token_ids) for conversation in conversations]
    partial = path.with_suffix(".partial")
    save_file(
        {
            "token_ids": np.concatenate([conversation.token_ids for conversation in conversations]),
            "lengths": np.array(lengths, dtype=np.int32),
            "prompt_lengths": np.array([c.prompt_length for c in conversations], dtype=np.int32),
            "keys": np.array([c.key for c in conversations], dtype=np.int64),
        },
        partial,
    )
    partial.rename(path)
    return path


def shard_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.safetensors"))


def read_shard(path: Path) -> Iterator[Conversation]:
    tensors = load_file(path)
    ends = np.cumsum(tensors["lengths"])
    rows = zip(tensors["keys"], tensors["prompt_lengths"], tensors["lengths"], ends, strict=True)
    for key, prompt_length, length, end in rows:
        yield Conversation(int(key), int(prompt_length), tensors["token_ids"][end - length : end])


def written_keys(directory: Path) -> set[int]:
    """The keys of all conversations so far, by which an interrupted run knows where it was."""
    return {int(key) for path in shard_paths(directory) for key in load_file(path)["keys"]}
