"""Reads a model's weights for plain PyTorch: matrices for products, embeddings, biases and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch

from evospec.engine.models.int4_blocks import BLOCK_BYTES, codes_of, scales_of
from evospec.engine.models.projection import Fp8Linear, Int4Linear, Linear, Projection
from evospec.engine.models.weights import Fp8Tensor, WeightSource
from evospec.engine.tensor_parallel.ranks import Ranks
from evospec.kernels.fp8 import MULTIPLE
from evospec.kernels.int4 import BLOCK

_ReadRows = Callable[[slice], torch.Tensor]
_VALUES_AT_ONCE = 2**18
"""Of a matrix, when it is read"""


@dataclass
class WeightReader:
    """Reads weights in the dtype, and onto the device, in which plain PyTorch computes with them.

    With ``ranks`` they are this rank's share of them. With ``multiplies_fp8`` matrices of FP8 stay as they are, with
    ``multiplies_int4`` those of 4 bits.
    """

    source: WeightSource
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    ranks: Ranks | None
    multiplies_fp8: bool = False
    multiplies_int4: bool = False
    num_bytes: int = 0
    """Of what was read"""

    def linear(self, *modules: str) -> Projection:
        """This rank's rows of some modules, one below the other."""
        names = [module + ".weight" for module in modules]
        bias = self.rows(*(module + ".bias" for module in modules)) if modules[0] + ".bias" in self.shapes else None
        shares = [self._share(self.shapes[name][0]) for name in names]
        if (projection := self._int4(names, shares, range(self.shapes[names[0]][1]), bias)) is not None:
            return projection
        tensors = self._fp8(names, self.shapes[names[0]][1], *map(len, shares))
        if not tensors:
            return Linear(self.rows(*names), bias)
        codes = self._stacked(names, [tensor.codes for tensor in tensors], torch.float8_e4m3fn)
        scales = [tensor.scales[share.start : share.stop] for tensor, share in zip(tensors, shares, strict=True)]
        return self._fp8_linear(codes, torch.cat(scales), bias)

    def linear_of_sum(self, module: str) -> Projection:
        """This rank's columns of a module whose results all ranks sum, of which the first has the bias."""
        name, bias_name = module + ".weight", module + ".bias"
        is_first = self.ranks is None or self.ranks.rank == 0
        bias = self.exact(bias_name).to(self.dtype) if is_first and bias_name in self.shapes else None
        height, width = self.shapes[name]
        columns = self._share(width)
        if (projection := self._int4([name], [range(height)], columns, bias)) is not None:
            return projection
        tensors = self._fp8([name], height, len(columns))
        kind, read = (torch.float8_e4m3fn, tensors[0].codes) if tensors else (self.dtype, self._values(name))
        whole = torch.empty(height, len(columns), dtype=kind, device=self.device)
        self._fill(whole, read, range(height), columns)
        return self._fp8_linear(whole, tensors[0].scales, bias) if tensors else Linear(whole, bias)

    def rows(self, *names: str) -> torch.Tensor:
        """This rank's rows of some weights, one below the other."""
        return self._stacked(names, [self._values(name) for name in names], self.dtype)

    def _stacked(self, names: Sequence[str], reads: Sequence[_ReadRows], dtype: torch.dtype) -> torch.Tensor:
        """This rank's rows of some weights, as ``reads`` give them, one below the other."""
        shares = [self._share(self.shapes[name][0]) for name in names]
        heights = [len(share) for share in shares]
        whole = torch.empty(sum(heights), *self.shapes[names[0]][1:], dtype=dtype, device=self.device)
        for part, read, share in zip(torch.split(whole, heights), reads, shares, strict=True):
            self._fill(part, read, share)
        return whole

    def _values(self, name: str) -> _ReadRows:
        return partial(self.source.dequantized, name)

    def _fp8(self, names: Sequence[str], *sizes: int) -> list[Fp8Tensor]:
        """Matrices of FP8 of whose rows and columns so many are multiplied as they are; empty where one cannot be."""
        if not self.multiplies_fp8 or any(size % MULTIPLE for size in sizes):
            return []
        tensors = [tensor for tensor in map(self.source.fp8, names) if tensor is not None]
        return tensors if len(tensors) == len(names) else []

    def _fp8_linear(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Projection:
        self.num_bytes += scales.nbytes
        return Fp8Linear(codes, scales.to(self.device), bias)

    def _int4(
        self, names: Sequence[str], shares: Sequence[range], columns: range, bias: torch.Tensor | None
    ) -> Projection | None:
        """Rows and columns of matrices of 4 bits, one below the other; None where they are not, or cut blocks."""
        if not self.multiplies_int4 or columns.start % BLOCK or len(columns) % BLOCK:
            return None
        tensors = [tensor for tensor in map(self.source.quantized, names) if tensor and tensor.type in BLOCK_BYTES]
        if len(tensors) < len(names):
            return None
        blocks = slice(columns.start // BLOCK, columns.stop // BLOCK)
        shape = sum(map(len, shares)), len(columns) // BLOCK
        codes = torch.empty(*shape, BLOCK // 2, dtype=torch.uint8, device=self.device)
        scales = torch.empty(*shape, 2, dtype=torch.float16, device=self.device)
        self.num_bytes += codes.nbytes + scales.nbytes
        row = 0
        for tensor, share in zip(tensors, shares, strict=True):
            for part in _parts(share, self.shapes[names[0]][1]):
                read = tensor.blocks(slice(part.start, part.stop))
                read = read.reshape(len(part), -1, BLOCK_BYTES[tensor.type])[:, blocks]
                codes[row : row + len(part)] = codes_of(read)
                scales[row : row + len(part)] = scales_of(read, tensor.type)
                row += len(part)
        return Int4Linear(codes.flatten(1), scales, bias)

    def _share(self, length: int) -> range:
        return range(length)[slice(None) if self.ranks is None else self.ranks.share(length)]

    def _fill(self, out: torch.Tensor, read: _ReadRows, rows: range, columns: range | None = None) -> None:
        """A few rows at a time, so that the model is nowhere in float32."""
        self.num_bytes += out.nbytes
        for part in _parts(rows, prod(out.shape[1:])):
            values, first = read(slice(part.start, part.stop)), part.start - rows.start
            out[first : first + len(part)] = values if columns is None else values[:, columns.start : columns.stop]

    def exact(self, name: str) -> torch.Tensor:
        """A whole weight in float32."""
        weight = self.source.dequantized(name)
        self.num_bytes += weight.nbytes
        return weight.to(self.device)


def _parts(rows: range, width: int) -> Iterator[range]:
    """Of so many numbers each, as are read at once."""
    height = max(_VALUES_AT_ONCE // width, 1)
    return (rows[first : first + height] for first in range(0, len(rows), height))
