"""The output projection of a draft that has its own, over some of the target's tokens."""

from __future__ import annotations

import gguf.quants
import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType

from engine.loader import LoadedModel
from engine.models.eagle3_weights import DraftRows
from engine.models.llama import HeadSlab
from kernels.native import MatrixPart, PackedMatrix, Team, linear
from kernels.native_decoder import unpack_rows

_WEIGHT_TYPE = GGMLQuantizationType.Q8_0


class OwnHead:
    """A draft's own rows, and whose they are.

    With the compiled kernels they are rounded to 8 bits, which can cost acceptance only.

    Args:
        weights: the rows.
        target: whose vocabulary they are of.
    """

    def __init__(self, weights: DraftRows, target: LoadedModel) -> None:
        self.token_ids = weights.token_ids
        """[K] int64 on the CPU, ascending"""
        self._team = target.team
        row_of = torch.full((target.spec.vocab_size,), -1, dtype=torch.int32)
        row_of[self.token_ids] = torch.arange(len(self.token_ids), dtype=torch.int32)
        self.row_of = row_of.to(target.device)
        """[vocab] int32: the row of each token; -1: it has none"""
        if target.team is None or weights.rows.shape[1] % 32:
            rows = weights.rows
            self.slab = HeadSlab(lambda x: F.linear(x.to(rows.dtype), rows).float(), rows.nbytes, rows)
        else:
            self.slab = _packed(weights.rows, target.team, target.digits)

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """One logit for each row of hidden [n, hidden] and token [n]: [n] float32, NaN for a token without a row."""
        places = self.row_of[token_ids.long()]
        if self.slab.rows is not None:
            rows = self.slab.rows[places.clamp(min=0).long()]
        else:
            assert self.slab.packed is not None
            assert self._team is not None
            rows = unpack_rows(self._team, self.slab.packed, places.clamp(min=0))
        logits = (rows.float() * hidden.float()).sum(dim=1)
        return logits.masked_fill(places < 0, float("nan"))


def _packed(rows: torch.Tensor, team: Team, digits: int) -> HeadSlab:
    blocks = gguf.quants.quantize(rows.float().numpy(), _WEIGHT_TYPE)
    part = MatrixPart(np.arange(len(rows)), int(_WEIGHT_TYPE), blocks=blocks)
    packed = PackedMatrix(len(rows), rows.shape[1], [part], None, digits)
    return HeadSlab(lambda x: linear(team, packed, x), packed.num_bytes, packed=packed)
