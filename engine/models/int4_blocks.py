"""GGUF's blocks of 32 columns in 4 bits, taken apart for ``kernels.int4``, which has the same order of codes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGMLQuantizationType

_CODE_BYTES, _HALF = 16, 2
BLOCK_BYTES = {
    GGMLQuantizationType.Q4_0: _HALF + _CODE_BYTES,
    GGMLQuantizationType.Q4_1: 2 * _HALF + _CODE_BYTES,
}
"""Of each type: a scale, of Q4_1 a minimum, codes."""


def codes_of(blocks: npt.NDArray[np.uint8]) -> torch.Tensor:
    """[..., bytes of a block] → [..., 16] uint8."""
    return torch.from_numpy(np.ascontiguousarray(blocks[..., -_CODE_BYTES:]))


def scales_of(blocks: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> torch.Tensor:
    """[..., bytes of a block] → [..., 2] float16, scale and minimum. A code of Q4_0 means 8 less than it is.

    A scale of Q4_0 is below 8192: eight of them are a number of half precision, too.
    """
    scales = np.ascontiguousarray(blocks[..., :-_CODE_BYTES]).view(np.float16)
    if kind == GGMLQuantizationType.Q4_0:
        scales = np.concatenate((scales, -8 * scales), axis=-1)
    return torch.from_numpy(scales)
