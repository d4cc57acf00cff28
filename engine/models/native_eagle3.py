"""The EAGLE-3 draft on the compiled CPU kernels, its weights in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType

from evospec.engine.attention.base import AttentionBackend
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.batch import Features, ForwardBatch
from evospec.engine.models.config import ModelSpec
from evospec.engine.models.decoder import RotaryEmbedding
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.native_decoder import gate_up_rows, make_decoder, unsupported_sizes
from evospec.kernels.batched_lora import LoraRows
from evospec.kernels.native import MatrixPart, PackedMatrix, Team, linear, linear_to_rows, norm_features
from evospec.kernels.native_decoder import LayerWeights

WEIGHT_TYPE = GGMLQuantizationType.Q4_1


def unsupported_draft(config: Eagle3Config) -> str | None:
    """Why the kernels cannot run this draft; None where they can."""
    rope = config.variant.rope
    return unsupported_sizes(
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
        ("width of features", config.fused_size),
        ("number of turning dimensions", config.head_dim if rope is None else rope.dim),
    )


class NativeEagle3:
    """Same interface and mathematics as ``TorchEagleNetwork`` but for rounding.

    Weights are rounded to ``WEIGHT_TYPE`` (groups of 32): a third of the bytes of a draft step. It can cost acceptance
    only, and costs none that could be measured (docs/decisions/004-integer-products.md). ``attention`` must be a
    ``NativeAttention`` of the same ``team``.

    Args:
        draft: on the CPU, and not ``unsupported_draft``; not kept.
        spec: of the target.
        team: runs the kernels.
        max_model_len: longest sequence in tokens.
        digits: of activations, as ``PackedMatrix`` has them.
        embedding: [vocab, hidden], its own, which is kept as bf16 (None: it has the target's).
    """

    def __init__(
        self,
        draft: Eagle3,
        spec: ModelSpec,
        team: Team,
        max_model_len: int,
        digits: int = 2,
        embedding: torch.Tensor | None = None,
    ) -> None:
        config, variant = draft.config, draft.config.variant
        self.team, self._config = team, config
        self.shift = 0 if variant.first_token_has_entry else 1
        self.norm_output = variant.norm_output
        weights = {name: weight.detach() for name, weight in draft.named_parameters()}
        self._matrices = {
            name: PackedMatrix(len(weight), weight.shape[1], [_part(name, weight)], weights.get(_bias_of(name)), digits)
            for name, weight in weights.items()
            if weight.dim() == 2
        }
        biases = {_bias_of(name) for name in self._matrices}
        self._norms = {
            name: weight.float().clone() for name, weight in weights.items() if weight.dim() == 1 and name not in biases
        }
        rotary = RotaryEmbedding(variant.rope or spec.rope, max_model_len, torch.device("cpu"))
        self.layer = make_decoder(team, config, [self._layer_weights(rotary)], target=spec)
        self.embedding: PackedMatrix | None = None
        if embedding is not None:
            part = MatrixPart(np.arange(len(embedding)), values=embedding)
            self.embedding = PackedMatrix(len(embedding), embedding.shape[1], [part], None, digits)
        matrices = [*self._matrices.values(), *([] if self.embedding is None else [self.embedding])]
        self.weight_bytes = sum(matrix.num_bytes for matrix in matrices)

    def _layer_weights(self, rotary: RotaryEmbedding) -> LayerWeights:
        matrices, norms, variant = self._matrices, self._norms, self._config.variant
        return LayerWeights(
            qkv=[matrices["qkv_proj.weight"]],
            output=matrices["o_proj.weight"],
            mlp=(matrices["gate_up_proj.weight"], matrices["down_proj.weight"]),
            input_norm=norms["hidden_norm"],
            mlp_norm=norms["post_attention_norm"],
            cos_sin=rotary.cos_sin,
            embedding_norm=norms["embedding_norm"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            window=variant.sliding_window,
            norms_residual=variant.norm_before_residual,
        )

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, matrix in self._matrices.items():
            matrix.repack([_part(name, weights[name])], weights.get(_bias_of(name)))
        for name, norm in self._norms.items():
            norm.copy_(weights[name])

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        return linear(self.team, self._matrices["fc.weight"], self._normalised(features))

    def fuse_into(self, store: torch.Tensor, features: Features) -> None:
        normalised = self._normalised(features.values)
        linear_to_rows(self.team, self._matrices["fc.weight"], normalised, features.slots, store)

    def _normalised(self, features: torch.Tensor) -> torch.Tensor:
        norm, config, features = self._norms.get("feature_norm"), self._config, features.bfloat16()
        if norm is None:
            return features
        return norm_features(self.team, features, norm.view(config.num_feature_norms, -1), config.rms_norm_eps)

    def forward(
        self,
        batch: ForwardBatch,
        attention: AttentionBackend,
        embeddings: torch.Tensor,
        g: torch.Tensor,
        lora: LoraRows | None = None,
    ) -> torch.Tensor:
        """As of torch, but that a is float32, and the rows ``batch.logits_indices`` are the last of their sequences."""
        assert isinstance(attention, NativeAttention)
        attention.plan(batch)
        a = g.to(torch.float32, copy=True)
        adapted = None if lora is None else lora.native
        # A context that is only read, as that of a sequence's first draft, needs no attention and no MLP.
        wanted = None if len(batch.logits_indices) == len(a) else batch.logits_indices.int()
        self.layer.forward(attention.batch, attention.cache, a, embeddings.float().contiguous(), adapted, wanted)
        a = a if wanted is None else a[: len(wanted)]
        return self.layer.final_norm(self.output_norm, a).float() if self.norm_output else a

    @property
    def output_norm(self) -> torch.Tensor:
        """[hidden] float32, of ``head_input``."""
        return self._norms["output_norm"]

    def head_input(self, a: torch.Tensor) -> torch.Tensor:
        """[L, hidden] → RMSNorm(a) bf16, what the head projects."""
        return a.bfloat16() if self.norm_output else self.layer.final_norm(self.output_norm, a.contiguous())


def _bias_of(name: str) -> str:
    """Where the bias that belongs to a weight would be; its rows stay in place, as those of ``qkv_proj`` do."""
    return name.removesuffix("weight") + "bias"


def _part(name: str, weight: torch.Tensor) -> MatrixPart:
    blocks = gguf.quants.quantize(weight.float().numpy(), WEIGHT_TYPE)
    is_gate_up = name == "gate_up_proj.weight"
    row_map = np.concatenate(gate_up_rows(len(weight) // 2)) if is_gate_up else np.arange(len(weight))
    return MatrixPart(row_map, int(WEIGHT_TYPE), blocks=blocks)
