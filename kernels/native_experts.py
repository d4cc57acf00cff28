"""ctypes bindings of the compiled mixtures of experts (kernels/csrc/experts.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from evospec.kernels.native import MatrixStruct, PackedMatrix, address, integers, pointers


class _Expert(ctypes.Structure):
    _fields_ = (("gate_up", MatrixStruct), ("down", MatrixStruct))


class ExpertsStruct(ctypes.Structure):
    _fields_ = (*pointers("router", "router_bias", "experts"), *integers("count", "per_token", "normalized"))


class MixtureWeights:
    """A mixture of experts in place of a layer's MLP.

    Args:
        router: float32 [experts, hidden].
        experts: gate_up, as in ``LayerWeights``, and down of each.
        per_token: how many of them each token goes through.
        normalized: whether the weights of a token's experts are made to sum to one.
        router_bias: float32 [experts], or None.
    """

    def __init__(
        self,
        router: torch.Tensor,
        experts: Sequence[tuple[PackedMatrix, PackedMatrix]],
        per_token: int,
        normalized: bool,
        router_bias: torch.Tensor | None = None,
    ) -> None:
        self.matrices = [matrix for expert in experts for matrix in expert]
        self._router, self._bias = router.contiguous(), router_bias
        self._array = (_Expert * len(experts))(*(_Expert(gate_up.struct, down.struct) for gate_up, down in experts))
        addresses = address(self._router), address(self._bias), ctypes.addressof(self._array)
        self.struct = ExpertsStruct(*addresses, len(experts), per_token, normalized)
