"""What the grid compares: prompts, loads, temperatures, and sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.common.drafting import NONE, Drafting
from benchmarks.vocabulary.modes import FR_SPEC, FULL, HARD_SWITCH, NANOSPEC, Mode, make_mode, sizes_of
from evospec.engine.config import MAX_TAIL_TOKENS

DEFAULT, LOOKUP = "default", "prompt lookup"


@dataclass(frozen=True)
class Cell:
    """Requests that every side answers."""

    prompts: str
    """The name of a set."""
    load: int
    """Requests at a time."""
    temperature: float


def cells(sets: Sequence[str], loads: Sequence[int], temperatures: Sequence[float]) -> Iterator[Cell]:
    """All sets at one load and temperature before the next, so that what there is so far is about all of them."""
    for temperature, load, name in product(temperatures, loads, sets):
        yield Cell(name, load, temperature)


def answers(side: str, cell: Cell) -> bool:
    """Whether a side is in a cell: all are where requests are greedy and alone, else those that would be served."""
    return (cell.load, cell.temperature) == (1, 0.0) or side in (NONE, LOOKUP, DEFAULT) or side.endswith(", lookup")


def sides_of(model: str, names: Sequence[str] = (), draft: str | None = None) -> dict[str, Mode]:
    """The sides by name; ``names``: only these; ``draft``: a draft model's name, in place of the model's own draft."""
    drafting = Drafting("eagle3" if draft is None else "draft_model", draft, adaptive=True)
    sizes = sizes_of(model, drafting.method)
    best, ours = sizes.statics[0], sizes.ours
    warm = "target_signal=every,graph=false,prior=off,replacement=lru"
    written: Mapping[str, str] = {
        NONE: NONE,
        LOOKUP: FULL,
        **{f"{size} frequent, lookup": f"static:{size}" for size in sizes.statics},
        f"{best} frequent": f"static:{best}/copies=false",
        "FR-Spec, lookup": f"static:{sizes.fr_spec}",
        "FR-Spec": f"{FR_SPEC}{sizes.fr_spec}",
        "NanoSpec, lookup": f"dynamic:{sizes.num_special}+{MAX_TAIL_TOKENS}/{warm}",
        "NanoSpec": NANOSPEC,
        "full head, lookup": FULL,
        "hard switch": HARD_SWITCH,
        "the paper's": f"paper:{sizes.fr_spec}",
        DEFAULT: ours,
        "without prior": f"{ours}/prior=off",
        "without vocabulary": "dynamic:full+0",
        "without lookup": f"{ours}/copies=false",
        "fixed lengths": ours,
    }
    wanted = [name for name in written if not names or name in names]
    special = {LOOKUP: Drafting("ngram", adaptive=True), "fixed lengths": replace(drafting, adaptive=False)}
    return {name: make_mode(written[name], model, special.get(name, drafting), sizes.num_special) for name in wanted}
