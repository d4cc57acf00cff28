"""The output projection of a draft that has its own, and what it makes of tokens that it lacks."""

from __future__ import annotations

import gguf.quants
import numpy as np
import structlog
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType

from evospec.engine.loader import LoadedModel
from evospec.engine.models.decoder import HeadSlab
from evospec.engine.models.eagle3_weights import DraftRows
from evospec.kernels.native import MatrixPart, PackedMatrix, linear
from evospec.kernels.native_decoder import unpack_rows

log = structlog.get_logger(__name__)

_HEAD_TYPE = GGMLQuantizationType.Q8_0
_HELD_OUT = 16
"""One token of so many is not fitted to, but tells how well the fit does."""
_MOST_HELD_OUT = 1024
_GOOD_SHARE = 0.5
"""Of the held-out tokens, at least so many must be nearer to their own rows than other tokens are."""
_RIDGE = 1e-3
"""Of the mean square of the target's rows."""
_FITTED_AT_ONCE = 4096
"""Rows, which bounds the memory of a fit."""


class OwnHead:
    """The head of a draft: its rows, and which of the target's tokens they are.

    A token that it lacks gets the target's row through a linear map, fitted to the tokens that both heads have. With
    the compiled kernels rows are rounded to 8 bits, which can cost acceptance only.

    Args:
        weights: the rows.
        target: whose vocabulary they are of.
    """

    def __init__(self, weights: DraftRows, target: LoadedModel) -> None:
        self.token_ids = weights.token_ids
        """[K] int64 on the CPU, ascending"""
        self._target = target
        row_of = torch.full((target.spec.vocab_size,), -1, dtype=torch.int32)
        row_of[self.token_ids] = torch.arange(len(self.token_ids), dtype=torch.int32)
        self.row_of = row_of.to(target.device)
        """[vocab] int32: the row of each token; -1: it has none"""
        self.slab = _slab(weights.rows, target)
        """All of its rows."""
        self.width = weights.rows.shape[1]
        """Of a row."""
        self._map: torch.Tensor | None = None

    def slab_of(self, token_ids: torch.Tensor) -> HeadSlab:
        """The rows of some of its tokens [n] int64, ascending; copied together, but where they are all of them."""
        if len(token_ids) == len(self.token_ids):
            return self.slab
        return _slab(self.rows(token_ids.to(self.row_of.device)), self._target)

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] integers → [n, hidden], by the map where the head lacks a token; zeros where there is no map either."""
        places = self.row_of[token_ids.long()]
        rows = self._own_rows(places)
        lacking = places < 0
        if lacking.any():
            ids = token_ids[lacking].int()
            rows[lacking] = 0 if self._map is None else self._mapped(ids).to(rows.dtype)
        return rows

    def logits(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """One logit for each row of hidden [n, hidden] and token [n]: [n] float32, NaN for a token without a row."""
        places = self.row_of[token_ids.long()]
        logits = (self._own_rows(places).float() * hidden.float()).sum(dim=1)
        return logits.masked_fill(places < 0, float("nan"))

    def _own_rows(self, places: torch.Tensor) -> torch.Tensor:
        """[n, hidden], the first one for -1."""
        if self.slab.rows is not None:
            return self.slab.rows[places.clamp(min=0).long()]
        assert self.slab.packed is not None
        assert self._target.team is not None
        return unpack_rows(self._target.team, self.slab.packed, places.clamp(min=0))

    def _mapped(self, token_ids: torch.Tensor) -> torch.Tensor:
        assert self._map is not None
        return self._target.model.head_rows(token_ids).float() @ self._map

    def fit_lacking(self) -> bool:
        """Fit the map, before tokens are drafted that the head lacks; whether their rows are good enough for that.

        By ridge regression of its rows on the target's, judged by tokens that were not fitted to.
        """
        if len(self.token_ids) == self._target.spec.vocab_size:
            return False
        own = self._own_rows(torch.arange(len(self.token_ids), dtype=torch.int32, device=self.row_of.device))
        is_held_out = torch.arange(len(own)) % _HELD_OUT == _HELD_OUT - 1
        fitted, held_out = torch.where(~is_held_out)[0], torch.where(is_held_out)[0][:_MOST_HELD_OUT]
        if not len(held_out):
            return False
        size, width, device = self._target.spec.hidden_size, own.shape[1], own.device
        squares, products = torch.zeros(size, size, device=device), torch.zeros(size, width, device=device)
        for some in torch.split(fitted, _FITTED_AT_ONCE):
            theirs = self._target.model.head_rows(self.token_ids[some].int().to(device)).float()
            squares += theirs.T @ theirs
            products += theirs.T @ own[some.to(device)].float()
        ridge = _RIDGE * squares.diagonal().mean()
        self._map = torch.linalg.solve(squares + ridge * torch.eye(size, device=device), products)
        share = self._share_nearest(F.normalize(own.float()), held_out.to(device))
        log.info("tokens that the draft's head lacks", good=share >= _GOOD_SHARE, held_out_nearest=round(share, 3))
        return share >= _GOOD_SHARE

    def _share_nearest(self, own: torch.Tensor, places: torch.Tensor) -> float:
        """Of some of its tokens, for how many the mapped row points more to the token's own row than all others do."""
        others = own[places] @ own.T
        others.scatter_(1, places[:, None], -torch.inf)
        mapped = F.normalize(self._mapped(self.token_ids[places.cpu()].int().to(own.device)))
        return float(((mapped * own[places]).sum(dim=1) > others.amax(dim=1)).float().mean())


def _slab(rows: torch.Tensor, target: LoadedModel) -> HeadSlab:
    team = target.team
    if team is None or rows.shape[1] % 32:
        return HeadSlab(lambda x: F.linear(x.to(rows.dtype), rows).float(), rows.nbytes, rows)
    blocks = gguf.quants.quantize(rows.float().numpy(), _HEAD_TYPE)
    part = MatrixPart(np.arange(len(rows)), int(_HEAD_TYPE), blocks=blocks)
    packed = PackedMatrix(len(rows), rows.shape[1], [part], None, target.digits)
    return HeadSlab(lambda x: linear(team, packed, x), packed.num_bytes, packed=packed)
