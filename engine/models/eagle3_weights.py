"""Loads EAGLE-3 drafts: this project's own, and those that ``engine.models.eagle3_import`` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.eagle3 import Eagle3, frozen_draft, load_draft
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.eagle3_import import (
    DRAFTED,
    EMBEDDING,
    HEAD,
    TARGET_OFFSETS,
    foreign_config,
    is_foreign_draft,
    parts_of,
    plain_name,
    weight_files,
)
from evospec.engine.models.safetensors_spec import Header

Rows = Callable[[torch.Tensor], torch.Tensor]
_ROWS_COMPARED = 4096
"""At a time"""
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class DraftRows:
    """An output projection over some of the target's tokens."""

    token_ids: torch.Tensor
    """[K] int64 on the CPU, ascending"""
    rows: torch.Tensor
    """[K, hidden]"""


@dataclass(frozen=True)
class DraftWeights:
    """A draft's network, and what it does not share with the target."""

    network: Eagle3
    head: DraftRows | None = None
    """None: the target's"""
    embedding: torch.Tensor | None = None
    """[vocab, hidden]; None: the target's"""


def load_weights(
    directory: Path,
    spec: ModelSpec,
    capture_layers: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> DraftWeights:
    """The draft of a directory, this project's or another's, ready to serve. ``foreign_config`` explains the arguments.

    Raises:
        ModelError: a file is damaged, not supported, or does not fit the target.
    """
    if not is_foreign_draft(directory):
        network = load_draft(directory, dtype, device)
        network.config.check_target(spec, directory)
        return DraftWeights(network)
    tensors = _tensors(directory)
    header: Header = {name: (tuple(one.shape), _DTYPES.get(one.dtype)) for name, one in tensors.items()}
    config = foreign_config(directory, header, spec, capture_layers)
    parts = parts_of(config)
    state = {name: torch.cat([tensors[part] for part in parts[name]]) for name in config.tensor_shapes()}
    head = None if HEAD not in tensors else _head(directory, config, tensors)
    embedding = tensors.get(EMBEDDING)
    return DraftWeights(
        frozen_draft(config, state, dtype, device),
        None if head is None else DraftRows(head.token_ids, head.rows.to(device=device, dtype=dtype)),
        None if embedding is None else embedding.to(device=device, dtype=dtype),
    )


def without_copies(weights: DraftWeights, vocab_size: int, head_rows: Rows, embed: Rows) -> DraftWeights:
    """The same draft, with the target's head and embedding where its own are exact copies, as they often are.

    ``head_rows`` and ``embed`` are the target's: token ids [n] int32 → their rows [n, hidden].
    """
    head, embedding = weights.head, weights.embedding
    if head is not None and len(head.rows) == vocab_size and _are_rows(head.rows, head_rows):
        head = None
    if embedding is not None and _are_rows(embedding, embed):
        embedding = None
    return DraftWeights(weights.network, head, embedding)


def _are_rows(rows: torch.Tensor, of_target: Rows) -> bool:
    for start in range(0, len(rows), _ROWS_COMPARED):
        some = rows[start : start + _ROWS_COMPARED]
        token_ids = torch.arange(start, start + len(some), dtype=torch.int32, device=rows.device)
        if not torch.equal(some.float(), of_target(token_ids).float()):
            return False
    return True


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All that the files hold, by ``plain_name``."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        try:
            if path.suffix == ".bin":
                stored = torch.load(path, map_location="cpu", weights_only=True)
            else:
                stored = load_file(path)
        except Exception as error:  # of a damaged pickle, whatever the loader's own code runs into
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{path}: cannot be read: {reason}") from error
        if not isinstance(stored, dict) or not all(map(_is_plain, stored.values())):
            raise ModelError(f"{path}: must hold tensors by name, with all of their values")
        tensors |= {plain_name(str(name)): one for name, one in stored.items()}
    return tensors


def _is_plain(one: object) -> bool:
    """Whether it is a tensor that has its values in memory, none of them left out."""
    if not isinstance(one, torch.Tensor) or one.is_nested:
        return False
    return one.device.type == "cpu" and one.layout == torch.strided


def _head(directory: Path, config: Eagle3Config, tensors: Mapping[str, torch.Tensor]) -> DraftRows:
    """The draft's own head, its rows in the order of the target's tokens."""
    rows, offsets, drafted = tensors[HEAD], tensors.get(TARGET_OFFSETS), tensors.get(DRAFTED)
    token_ids = torch.arange(len(rows))
    if offsets is not None:
        token_ids = token_ids + offsets.long()
    in_order, order = token_ids.sort()
    if in_order[0] < 0 or in_order[-1] >= config.vocab_size or (in_order.diff() == 0).any():
        raise ModelError(f"{directory}: {TARGET_OFFSETS} does not name tokens of the model, or one twice")
    if drafted is not None and not torch.equal(drafted.bool().nonzero()[:, 0], in_order):
        raise ModelError(f"{directory}: {TARGET_OFFSETS} and {DRAFTED} disagree about the draft's tokens")
    return DraftRows(in_order, rows[order])
