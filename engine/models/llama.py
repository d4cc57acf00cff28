"""Llama and Qwen2 decoders in plain PyTorch: the reference every faster implementation is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend
from engine.batch import ForwardBatch, ForwardOutput
from engine.models.config import ModelSpec
from engine.models.weights import WeightSource
from kernels.native import PackedMatrix


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 and rounded before the weight."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


class RotaryEmbedding:
    """Rotary position embedding of the two-halves kind (RoFormer, arXiv 2104.09864), tables in float32."""

    def __init__(self, spec: ModelSpec, max_positions: int, device: torch.device) -> None:
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        inverse_frequencies = 1.0 / spec.rope_theta**exponents
        if spec.rope_freq_factors is not None:
            inverse_frequencies = inverse_frequencies / torch.tensor(spec.rope_freq_factors)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies)
        self.cos = angles.cos().to(device)
        """[max_positions, head_dim / 2]"""
        self.sin = angles.sin().to(device)

    def __call__(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate [T, heads, head_dim] at positions [T]; the same shape and dtype."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        first, second = heads.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(heads.dtype)


@dataclass(frozen=True)
class HeadSlab:
    """An output projection, or some rows of one, copied together."""

    project: Callable[[torch.Tensor], torch.Tensor]
    """[L, hidden] → [L, rows] float32, maybe valid until the next call only"""
    num_bytes: int
    """Memory of its own"""
    rows: torch.Tensor | None = None
    """[rows, hidden], where they are floating-point numbers as they are"""
    packed: PackedMatrix | None = None
    """The same as the compiled kernels have it"""


@dataclass(frozen=True)
class DecoderLayer:
    """One transformer block. Query, key and value share a matrix, and so do gate and up."""

    spec: ModelSpec
    index: int
    input_layernorm: torch.Tensor
    """[hidden]"""
    qkv_proj: torch.Tensor
    """[(num_heads + 2 * num_kv_heads) * head_dim, hidden]"""
    qkv_bias: torch.Tensor | None
    o_proj: torch.Tensor
    """[hidden, num_heads * head_dim]"""
    post_attention_layernorm: torch.Tensor
    """[hidden]"""
    gate_up_proj: torch.Tensor
    """[2 * intermediate, hidden]"""
    down_proj: torch.Tensor
    """[hidden, intermediate]"""

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, rotary: RotaryEmbedding, attention: AttentionBackend
    ) -> torch.Tensor:
        """The residual stream after this layer: [T, hidden] → [T, hidden]."""
        eps = self.spec.rms_norm_eps
        normed = rms_norm(hidden, self.input_layernorm, eps)
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = F.linear(normed, self.qkv_proj, self.qkv_bias).view(len(normed), -1, self.spec.head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        attended = attention.forward(self.index, rotary(q, positions), rotary(k, positions), v)
        hidden = hidden + F.linear(attended.flatten(1), self.o_proj)
        normed = rms_norm(hidden, self.post_attention_layernorm, eps)
        gate, up = F.linear(normed, self.gate_up_proj).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down_proj)


@dataclass(frozen=True)
class LlamaForCausalLM:
    """A decoder with its embedding and output projection. Inference only: no gradients."""

    spec: ModelSpec
    embed_tokens: torch.Tensor
    """[vocab, hidden]"""
    layers: list[DecoderLayer]
    norm: torch.Tensor
    """[hidden]"""
    lm_head: torch.Tensor
    """[vocab, hidden]; the embedding itself where the model ties them"""
    rotary: RotaryEmbedding

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        own = [self.embed_tokens, self.norm, *(() if self.lm_head is self.embed_tokens else (self.lm_head,))]
        of_layers = [value for layer in self.layers for value in vars(layer).values() if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*own, *of_layers))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, attention: AttentionBackend, capture: Sequence[int] = ()) -> ForwardOutput:
        """Run all layers; ``capture``: those whose output is wanted as features, in ascending order."""
        attention.plan(batch)
        hidden = self.embed(batch.token_ids)
        captured = []
        for layer in self.layers:
            hidden = layer.forward(hidden, batch.positions, self.rotary, attention)
            if layer.index in capture:
                captured.append(hidden)
        features = torch.cat(captured, dim=1) if captured else None
        return ForwardOutput(rms_norm(hidden, self.norm, self.spec.rms_norm_eps), features)

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding: [T] → [T, hidden]."""
        return F.embedding(token_ids, self.embed_tokens)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[L, hidden] → [L, vocab] float32."""
        return F.linear(hidden, self.lm_head).float()

    def head_slab(self, token_ids: torch.Tensor | None) -> HeadSlab:
        """``compute_logits`` for these tokens only: a contiguous copy of their rows of the head; None for all."""
        if token_ids is None:
            return HeadSlab(self.compute_logits, 0, self.lm_head)
        rows = self.head_rows(token_ids)
        return HeadSlab(lambda hidden: F.linear(hidden, rows).float(), rows.numel() * rows.element_size(), rows)

    def head_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the output projection: [n] integers → [n, hidden]."""
        return self.lm_head[token_ids.to(self.lm_head.device)]


def load_model(
    source: WeightSource, spec: ModelSpec, dtype: torch.dtype, device: torch.device, max_model_len: int | None = None
) -> LlamaForCausalLM:
    """Dequantise all weights to ``dtype`` on ``device``.

    ``max_model_len`` is the number of positions the rotary tables cover (default: the model's limit).
    """

    def load(*names: str) -> torch.Tensor:
        tensors = [source.dequantized(name).to(device, dtype) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    embed_tokens = load("model.embed_tokens.weight")
    return LlamaForCausalLM(
        spec=spec,
        embed_tokens=embed_tokens,
        layers=[_load_layer(load, spec, index) for index in range(spec.num_layers)],
        norm=load("model.norm.weight"),
        lm_head=embed_tokens if spec.tie_word_embeddings else load("lm_head.weight"),
        rotary=RotaryEmbedding(spec, max_model_len or spec.max_position_embeddings, device),
    )


def _load_layer(load: Callable[..., torch.Tensor], spec: ModelSpec, index: int) -> DecoderLayer:
    prefix = f"model.layers.{index}."
    qkv = [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
    return DecoderLayer(
        spec=spec,
        index=index,
        input_layernorm=load(prefix + "input_layernorm.weight"),
        qkv_proj=load(*(name + ".weight" for name in qkv)),
        qkv_bias=load(*(name + ".bias" for name in qkv)) if spec.attention_bias else None,
        o_proj=load(prefix + "self_attn.o_proj.weight"),
        post_attention_layernorm=load(prefix + "post_attention_layernorm.weight"),
        gate_up_proj=load(prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"),
        down_proj=load(prefix + "mlp.down_proj.weight"),
    )
