"""A model's matrices, one by one, and a share of them without the other ranks."""

from __future__ import annotations

from evospec.engine.models.decoder import TorchDecoder
from evospec.engine.models.mlp import Mlp
from evospec.engine.models.projection import Projection
from evospec.engine.tensor_parallel.ranks import Ranks


class LoneRank(Ranks):
    """One of several, without the others."""

    def __init__(self, rank: int, size: int = 2) -> None:
        self.rank, self.size = rank, size


def projections(model: TorchDecoder) -> list[Projection]:
    found: list[Projection] = []
    for layer in model.layers:
        assert isinstance(layer.mlp, Mlp)
        found += layer.qkv_proj, layer.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
    return found
