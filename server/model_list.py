"""What ``evospec list`` prints: the models that are known by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evospec.engine.models.eagle3_config import WEIGHTS_FILE
from evospec.engine.models.registry import REGISTRY, registry_path
from evospec.engine.speculation.draft_files import DRAFTS

_HEADERS = ("NAME", "MB", "DRAFT", "FETCHED", "WHAT IT IS")


def model_list(cache_dir: Path) -> str:
    """A line for each, in columns; ``cache_dir`` as in ``ModelConfig``."""
    rows = [_HEADERS, *_rows(cache_dir)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _rows(cache_dir: Path) -> Iterator[tuple[str, ...]]:
    for name, model in REGISTRY.items():
        has_draft, is_here = (DRAFTS / name / WEIGHTS_FILE).is_file(), registry_path(name, cache_dir).is_file()
        answers = ("yes" if is_so else "no" for is_so in (has_draft, is_here))
        yield name, f"{model.num_bytes / 1e6:,.0f}", *answers, model.description
