"""Where a model's weights are: each is a tensor of its files, or some rows of one. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from evospec.engine.models.config import ModelSpec
from evospec.engine.models.families.known import family_of

_OF_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")
_OF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
_ALTERNATING = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class StoredRows:
    """Rows ``first``, ``first + step`` and so on, ``count`` of them, of a stored tensor, by its Hugging Face name."""

    tensor: str
    shape: tuple[int, ...]
    """Of the whole tensor"""
    first: int
    count: int
    step: int = 1
    index: int | None = None
    """Which one of several matrices or vectors of the tensor they are rows of; None: it is a single one"""

    def part(self, rows: slice) -> slice:
        """Some of these rows, as rows of the stored matrix."""
        places = range(self.first, self.first + (self.count - 1) * self.step + 1, self.step)[rows]
        return slice(places.start, places.stop, places.step)


def stored_rows(spec: ModelSpec, stacks_experts: bool) -> dict[str, StoredRows]:
    """Of every weight of ``ModelSpec.tensor_shapes``, by its name there.

    ``stacks_experts``: a matrix of all experts is one tensor, as in GGUF files.
    """
    shapes, places, family = spec.tensor_shapes(), dict[str, StoredRows](), family_of(spec.architecture)
    fused = {part: (whole, parts) for whole, parts in family.fused.items() for part in parts}
    for name, shape in shapes.items():
        places[name] = StoredRows(name, shape, 0, shape[0])
        of_layer = _OF_LAYER.fullmatch(name)
        if of_layer is None:
            continue
        prefix, part, kind = of_layer.groups()
        expert = _OF_EXPERT.fullmatch(part)
        if expert is not None and spec.experts is not None and (stacks_experts or family.alternates_experts):
            index, module, row, step = int(expert[1]), expert[2], 0, 1
            if not stacks_experts and module in _ALTERNATING:
                row, step, module = _ALTERNATING.index(module), len(_ALTERNATING), "gate_up_proj"
            stack = (spec.experts.count, shape[0] * step, *shape[1:])
            places[name] = StoredRows(f"{prefix}mlp.experts.{module}.{kind}", stack, row, shape[0], step, index)
        elif part in fused:
            whole, parts = fused[part]
            heights = [shapes[f"{prefix}{each}.{kind}"][0] for each in parts]
            first = sum(heights[: parts.index(part)])
            places[name] = StoredRows(f"{prefix}{whole}.{kind}", (sum(heights), *shape[1:]), first, shape[0])
    return places


def stored_shapes(spec: ModelSpec, stacks_experts: bool) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the files must have, by its Hugging Face name."""
    return {place.tensor: place.shape for place in stored_rows(spec, stacks_experts).values()}
