"""What is said of a trained draft: a page beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CARD = """# EAGLE-3 draft for {target}

Drafts tokens for {target} in EvoSpec; it predicts through the target's own head and is of no use without it. It never
changes an output.

| | |
|---|---|
| weights | `draft.safetensors`, bf16, {megabytes:.1f} MB; shape in `config.json` |
| made by | `{command}` |
| data | the target's own answers and their prompts{text}, with the target's distributions as labels |
| positions trained on | {anchors:,} ({distinct:,} distinct) |
| hours | {hours:.2f} |

On answers that it was not trained on (teacher-forced, full head; {target}'s own most likely token is right):
acceptance length at draft length {length} **{acceptance:.3f}**, accuracy by place {accuracy}; over the run in
`training.json`.
"""


def write_card(
    directory: Path, target: str, with_text: bool, command: Sequence[str], history: Sequence[dict[str, Any]]
) -> None:
    """Write README.md.

    Args:
        directory: of the draft.
        target: name of the model it drafts for.
        with_text: whether given text was learned from too.
        command: what trained it.
        history: one entry a validation, as ``TrainingProgress.history`` has them.
    """
    last = history[-1]
    card = _CARD.format(
        target=target,
        megabytes=(directory / "draft.safetensors").stat().st_size / 1e6,
        command=" ".join(command),
        text=", and text that others wrote" if with_text else "",
        anchors=last["anchors"],
        distinct=last["distinct"],
        hours=last["seconds"] / 3600,
        length=len(last["accuracy"]),
        acceptance=last["acceptance_length"],
        accuracy=", ".join(f"{step:.3f}" for step in last["accuracy"]),
    )
    (directory / "README.md").write_text(card)
