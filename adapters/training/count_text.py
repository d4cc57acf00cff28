"""Adds a directory of text to the token counts of a draft: ``evospec vocab add-text MODEL DIRECTORY``.

The model's own answers say what it says often. They are too few to say which of the rarer tokens it will want, and
text can: broad text, or text of the field that the server is for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from evospec.adapters.training.count import run, write_counts
from evospec.engine.config import ModelConfig
from evospec.engine.models.config import ModelError
from evospec.engine.models.registry import resolve_model
from evospec.engine.speculation.draft_files import DRAFTS
from evospec.engine.speculation.drafters.head import COUNTS_FILE, read_token_counts
from evospec.engine.text.tokenizer import Tokenizer

DEFAULT_SHARE = 0.3
"""Best on answers held out (docs/training-a-draft.md)."""
_TOTAL = 10**12
"""What mixed counts add up to: enough that a token seen once in billions of tokens is still counted."""
_PIECE_CHARACTERS = 65_536
"""Text is tokenised in pieces, so that a file may have any size."""


def count_text(files: Sequence[Path], tokenizer: Tokenizer) -> tuple[torch.Tensor, list[Path]]:
    """How often each token occurs in all files together: [vocab] int64; and the files that are no UTF-8, left out."""
    counts, left_out = np.zeros(tokenizer.vocab_size, dtype=np.int64), []
    for path in files:
        try:
            counts += _count_file(path, tokenizer)
        except UnicodeDecodeError:
            left_out.append(path)
    return torch.from_numpy(counts), left_out


def _count_file(path: Path, tokenizer: Tokenizer) -> NDArray[np.int64]:
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with path.open(encoding="utf-8") as file:
        while piece := file.read(_PIECE_CHARACTERS):
            counts += np.bincount(tokenizer.encode(piece, add_special_tokens=False), minlength=len(counts))
    return counts


def mixed(counts: torch.Tensor, text: torch.Tensor, share: float) -> torch.Tensor:
    """Relative frequencies of two counts, ``share`` of them the text's: [vocab] int64, some ``_TOTAL`` in all.

    Where ``counts`` has none at all, the text's alone.
    """
    if not counts.any():
        return text
    mixture = (1 - share) * counts.double() / counts.sum() + share * text.double() / text.sum()
    return (mixture * _TOTAL).round().long()


def main(
    model: Annotated[str, typer.Argument(help="Registry name, path or hub id of the target.")],
    directory: Annotated[
        Path, typer.Argument(help="Text files, in UTF-8; folders in it are read too.", exists=True, file_okay=False)
    ],
    share: Annotated[float, typer.Option(help="The text's weight beside the counts at hand.", min=0.001, max=0.999)] = (
        DEFAULT_SHARE
    ),
    draft: Annotated[Path | None, typer.Option(help="The draft's directory; default: drafts/<model>.")] = None,
) -> None:
    """Add text to the token counts of a model's draft, for speculation.vocabulary static:K and dynamic:K+S."""
    files = resolve_model(ModelConfig(name=model))
    tokenizer = Tokenizer.from_files(files)
    draft = draft or DRAFTS / files.name
    has_counts = (draft / COUNTS_FILE).is_file()
    counts = read_token_counts(draft, tokenizer.vocab_size) if has_counts else torch.zeros(tokenizer.vocab_size)
    text, left_out = count_text(sorted(path for path in directory.rglob("*") if path.is_file()), tokenizer)
    if left_out:
        print(f"left out, no UTF-8: {', '.join(map(str, left_out))}", file=sys.stderr)
    if not text.any():
        raise ModelError(f"{directory}: no text")
    print(f"{directory}: {int(text.sum()):,} tokens, {int((text > 0).sum()):,} distinct ones")
    write_counts(mixed(counts, text, share), draft)


if __name__ == "__main__":
    run(main)
