"""Conversations on disk: shards of token ids and the target's features. No pickle, nothing but numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file

CACHE = Path.home() / ".cache" / "evospec"


@dataclass(frozen=True)
class Conversation:
    """One answer of the target. ``token_ids[:prompt_length]`` is the prompt; ``key`` names prompt and sampling."""

    key: int
    prompt_length: int
    token_ids: npt.NDArray[np.int32]


def data_directory(model_name: str) -> Path:
    """Where the shards of a target's own answers are."""
    return CACHE / "train" / model_name


def text_directory(model_name: str) -> Path:
    """Where the shards of what others wrote are, which is neither validated on nor counted for vocabularies."""
    return data_directory(model_name) / "text"


def write_shard(directory: Path, conversations: Sequence[Conversation], features: Sequence[torch.Tensor]) -> Path:
    """Append one shard, whole or not at all; ``features`` [tokens, width] bf16 belong to one conversation each."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"shard-{len(shard_paths(directory)):05}.safetensors"
    with feature_path(path).open("wb") as file:
        for rows in features:
            file.write(rows.view(torch.int16).numpy().tobytes())
    partial = path.with_suffix(".partial")
    save_file(
        {
            "token_ids": np.concatenate([c.token_ids for c in conversations]),
            "lengths": np.array([len(c.token_ids) for c in conversations], dtype=np.int32),
            "prompt_lengths": np.array([c.prompt_length for c in conversations], dtype=np.int32),
            "keys": np.array([c.key for c in conversations], dtype=np.int64),
        },
        partial,
    )
    partial.rename(path)  # last: a shard that can be seen has its features
    return path


def shard_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.safetensors"))


def feature_path(shard: Path) -> Path:
    return shard.with_suffix(".features")


def read_shard(path: Path) -> Iterator[Conversation]:
    tensors = load_file(path)
    ends = np.cumsum(tensors["lengths"])
    rows = zip(tensors["keys"], tensors["prompt_lengths"], tensors["lengths"], ends, strict=True)
    for key, prompt_length, length, end in rows:
        yield Conversation(int(key), int(prompt_length), tensors["token_ids"][end - length : end])


def open_features(shard: Path, width: int) -> torch.Tensor:
    """The features of a shard, memory-mapped: [tokens, width] bf16."""
    array = np.memmap(feature_path(shard), dtype=np.int16, mode="c").reshape(-1, width)
    return torch.from_numpy(array).view(torch.bfloat16)


def written_keys(directory: Path) -> set[int]:
    """The keys of all conversations so far, by which an interrupted run knows where it was."""
    return {int(key) for path in shard_paths(directory) for key in load_file(path)["keys"]}
