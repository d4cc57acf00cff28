"""Where a model's weights are: each is a tensor of its files, or some rows of one. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.config import ModelSpec
from engine.models.families.known import family_of


@dataclass(frozen=True)
class StoredRows:
    """Rows ``first`` .. ``first + count - 1`` of a stored tensor, by its Hugging Face name."""

    tensor: str
    first: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def stored_rows(spec: ModelSpec) -> dict[str, StoredRows]:
    """Of every weight of ``ModelSpec.tensor_shapes``, by its name there."""
    shapes, places = spec.tensor_shapes(), dict[str, StoredRows]()
    fused = {part: (whole, parts) for whole, parts in family_of(spec.architecture).fused.items() for part in parts}
    for name, shape in shapes.items():
        prefix, of_layer, kind = _split(name)
        whole, parts = fused.get(of_layer, (of_layer, (of_layer,)))
        before = parts[: parts.index(of_layer)]
        first = sum(shapes[f"{prefix}{part}.{kind}"][0] for part in before)
        places[name] = StoredRows(f"{prefix}{whole}.{kind}", first, shape[0])
    return places


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the files must have, by its Hugging Face name."""
    shapes, stored = spec.tensor_shapes(), dict[str, tuple[int, ...]]()
    for name, place in stored_rows(spec).items():
        rows = max(place.first + place.count, stored.get(place.tensor, (0,))[0])
        stored[place.tensor] = (rows, *shapes[name][1:])
    return stored


def _split(name: str) -> tuple[str, str, str]:
    """ "model.layers.3.", "self_attn.q_proj" and "weight"; the first is empty outside of layers."""
    body, _, kind = name.rpartition(".")
    if not body.startswith("model.layers."):
        return "", body, kind
    index, _, of_layer = body.removeprefix("model.layers.").partition(".")
    return f"model.layers.{index}.", of_layer, kind
