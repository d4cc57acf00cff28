"""Where a model's weights are: each is a tensor of its files, or some rows of one. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.models.config import ModelSpec
from engine.models.families.known import family_of

_OF_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")
_OF_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class StoredRows:
    """Rows ``first`` .. ``first + count - 1`` of a stored tensor, by its Hugging Face name.

    Of a tensor of three dimensions they are counted through all of its matrices.
    """

    tensor: str
    shape: tuple[int, ...]
    """Of the whole tensor"""
    first: int
    count: int

    def part(self, rows: slice) -> slice:
        """Some of these rows, as rows of the stored tensor."""
        places = range(self.first, self.first + self.count)[rows]
        return slice(places.start, places.stop)


def stored_rows(spec: ModelSpec, stacks_experts: bool) -> dict[str, StoredRows]:
    """Of every weight of ``ModelSpec.tensor_shapes``, by its name there.

    ``stacks_experts``: a matrix of all experts is one tensor, as in GGUF files.
    """
    shapes, places = spec.tensor_shapes(), dict[str, StoredRows]()
    fused = {part: (whole, parts) for whole, parts in family_of(spec.architecture).fused.items() for part in parts}
    for name, shape in shapes.items():
        places[name] = StoredRows(name, shape, 0, shape[0])
        of_layer = _OF_LAYER.fullmatch(name)
        if of_layer is None:
            continue
        prefix, part, kind = of_layer.groups()
        expert = _OF_EXPERT.fullmatch(part)
        if expert is not None and spec.experts is not None and stacks_experts:
            stack = f"{prefix}mlp.experts.{expert[2]}.{kind}"
            places[name] = StoredRows(stack, (spec.experts.count, *shape), int(expert[1]) * shape[0], shape[0])
        elif part in fused:
            whole, parts = fused[part]
            heights = [shapes[f"{prefix}{each}.{kind}"][0] for each in parts]
            first = sum(heights[: parts.index(part)])
            places[name] = StoredRows(f"{prefix}{whole}.{kind}", (sum(heights), *shape[1:]), first, shape[0])
    return places


def stored_shapes(spec: ModelSpec, stacks_experts: bool) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the files must have, by its Hugging Face name."""
    return {place.tensor: place.shape for place in stored_rows(spec, stacks_experts).values()}
