"""What is said of a trained draft: a page and a plot beside its weights."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CARD = """# EAGLE-3 draft for {target}

Drafts tokens for {target} in EvoSpec; it predicts through the target's own head and is of no use without it. It never
changes an output. Apache-2.0.

| | |
|---|---|
| weights | `draft.safetensors`, bf16, {megabytes:.1f} MB; shape in `config.json` |
| made by | `{command}` |
| data | {data} |
| left out on purpose | law and medicine, the shift that online alignment must close; every evaluation prompt |
| seed | {seed} |
| positions trained on | {anchors:,} ({distinct:,} distinct), {phases} |
| hours | {hours:.2f} of training, beside other work |
| machine | {machine} |

On answers that it was not trained on (teacher-forced, full head; {target}'s own most likely token is right):
acceptance length at draft length {length} **{acceptance:.3f}**, accuracy by place {accuracy}. In the engine, on
evaluation prompts: `python -m benchmarks.speculation --acceptance` ([docs/benchmarks.md](../../docs/benchmarks.md)).

![accuracy over training](training.png)
"""
_DATA = (
    "the target's own answers to the training prompts of `benchmarks.prompts.build --train` (general questions and "
    "code), and those prompts, made by `python -m adapters.generate {target}`; labels are the target's distributions"
)
_TEXT = (
    "; also what others wrote, read by `python -m adapters.generate {target}` with `--text` (passages of manuals and "
    "code, `benchmarks.prompts.text`) or `--answers-of` (another model's answers to those prompts)"
)


def machine() -> str:
    """The processor this runs on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0].partition(':')[2].strip()}" if names else platform.processor()


def write_card(
    directory: Path,
    target: str,
    with_text: bool,
    command: Sequence[str],
    seed: int,
    phases: str,
    history: Sequence[dict[str, Any]],
) -> None:
    """Write README.md and training.png.

    Args:
        directory: of the draft.
        target: name of the model it drafts for.
        with_text: whether given text was learned from too.
        command: that trained it.
        seed: of the run.
        phases: in words.
        history: one entry a validation, as ``Progress.history`` has them.
    """
    last = history[-1]
    _plot(directory / "training.png", history)
    card = _CARD.format(
        target=target,
        megabytes=(directory / "draft.safetensors").stat().st_size / 1e6,
        command=" ".join(command),
        data=(_DATA + _TEXT if with_text else _DATA).format(target=target),
        seed=seed,
        anchors=last["anchors"],
        distinct=last["distinct"],
        phases=phases,
        hours=last["seconds"] / 3600,
        machine=machine(),
        length=len(last["accuracy"]),
        acceptance=last["acceptance_length"],
        accuracy=", ".join(f"{step:.3f}" for step in last["accuracy"]),
    )
    (directory / "README.md").write_text(card)


def _plot(path: Path, history: Sequence[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt  # a development package: training needs it, serving does not

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    millions = [entry["anchors"] / 1e6 for entry in history]
    for place in range(len(history[0]["accuracy"])):
        left.plot(millions, [entry["accuracy"][place] for entry in history], marker=".", label=f"place {place + 1}")
    left.set(xlabel="million positions trained on", ylabel="accuracy on unseen answers", ylim=(0, 1))
    left.legend()
    right.plot(millions, [entry["acceptance_length"] for entry in history], marker=".")
    right.set(xlabel="million positions trained on", ylabel="acceptance length, 4 drafts, teacher-forced")
    figure.savefig(path, dpi=120)
    plt.close(figure)
