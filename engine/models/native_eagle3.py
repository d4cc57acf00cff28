"""The EAGLE-3 draft on the compiled CPU kernels, its weights in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import gguf.quants
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType

from engine.attention.base import AttentionBackend
from engine.attention.native_cpu import NativeAttention
from engine.batch import ForwardBatch
from engine.models.config import ModelError, ModelSpec
from engine.models.eagle3 import Eagle3
from engine.models.llama import RotaryEmbedding
from kernels.batched_lora import LoraRows
from kernels.native import Decoder, LayerWeights, MatrixPart, PackedMatrix, Team, linear
from kernels.native_lora import NativeLora


class NativeEagle3:
    """Same mathematics as ``engine.models.eagle3.Eagle3`` but for rounding.

    Weights are rounded to Q8_0 (groups of 32, 8 bits): half the bytes of a draft step, for a change far below what
    training leaves open. It can cost acceptance only. ``attention`` must be a ``NativeAttention`` of the same ``team``.

    Args:
        draft: on the CPU; not kept.
        spec: of the target.
        team: runs the kernels.
        max_model_len: longest sequence in tokens.

    Raises:
        ModelError: the kernels cannot run a draft of this width.
    """

    def __init__(self, draft: Eagle3, spec: ModelSpec, team: Team, max_model_len: int) -> None:
        config = draft.config
        if config.intermediate_size % 32:
            raise ModelError(f"draft: intermediate_size {config.intermediate_size} is not a multiple of 32")
        self._team = team
        self._fc = _packed(draft.fc.weight)
        self._output_norm = draft.output_norm.detach().float()
        gate_rows = np.arange(config.intermediate_size) // 16 * 32 + np.arange(config.intermediate_size) % 16
        layer = LayerWeights(
            qkv=[_packed(draft.qkv_proj.weight)],
            output=_packed(draft.o_proj.weight),
            gate_up=_packed(draft.gate_up_proj.weight, np.concatenate((gate_rows, gate_rows + 16))),
            down=_packed(draft.down_proj.weight),
            input_norm=draft.hidden_norm.detach().float(),
            post_norm=draft.post_attention_norm.detach().float(),
            embedding_norm=draft.embedding_norm.detach().float(),
        )
        rotary = RotaryEmbedding(spec, max_model_len, torch.device("cpu"))
        self._layer = Decoder(
            team,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.rms_norm_eps,
            cos_sin=torch.cat((rotary.cos, rotary.sin), dim=1),
            layers=[layer],
        )
        matrices: Sequence[PackedMatrix] = (self._fc, *layer.qkv, layer.output, layer.gate_up, layer.down)
        self.weight_bytes = sum(matrix.num_bytes for matrix in matrices)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """[T, 3 * hidden] → g [T, hidden] float32."""
        return linear(self._team, self._fc, features.bfloat16())

    def forward(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        embeddings: torch.Tensor,
        g: torch.Tensor,
        lora: LoraRows | None = None,
    ) -> torch.Tensor:
        """Write the keys and values of the batch's tokens.

        Embeddings and g [T, hidden] → a [L, hidden] float32 of the rows ``batch.logits_indices``.
        """
        assert isinstance(attention, NativeAttention)
        attention.plan(batch)
        a = g.to(torch.float32, copy=True)
        adapted = None if lora is None else NativeLora(lora)
        self._layer.forward(attention.batch, attention.cache, a, 0, 1, embeddings.float().contiguous(), adapted)
        return a[batch.logits_indices]

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        """[L, hidden] → RMSNorm(a) bf16, what the target's head projects."""
        return self._layer.final_norm(self._output_norm, a.contiguous())


def _packed(weight: torch.Tensor, row_map: npt.NDArray[np.int64] | None = None) -> PackedMatrix:
    values = weight.detach().float().numpy()
    blocks = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    rows = np.arange(len(values)) if row_map is None else row_map
    return PackedMatrix(len(values), values.shape[1], [MatrixPart(rows, int(GGMLQuantizationType.Q8_0), blocks=blocks)])
